"""Bodies that are large in what no estimate of a call's size counts."""

from __future__ import annotations

from typing import Any

import pytest

from tests.stack.helpers import Application

BEYOND_GRPC = "x" * (5 * 2**20)
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "chat_template_kwargs": {"unused": BEYOND_GRPC}}
GENERATION = {"temperature": 0, "max_tokens": 3}


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/v1/chat/completions", GENERATION),
        ("/v1/chat/completions", {**GENERATION, "stream": True}),
        ("/v1/chat/completions/render", {}),
        ("/tokenize", {}),
    ],
)
def test_they_are_answered_as_small_ones_are(whole: Application, path: str, options: dict[str, Any]) -> None:
    response = whole.post(path, {**CHAT, **options})
    assert response.status_code == 200, response.text[:300]
    assert "error" not in response.text
