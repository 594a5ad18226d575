"""The client without an application."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from deployments.client import Client
from renderer.errors import OverloadedError

PROGRAM = """
import sys
import deployments.client
heavy = {"torch", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_a_program_that_imports_the_client_loads_no_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


class Router:
    """A handle of a router that dies under every call. A stand-in: how to kill one is tested with the failure rules."""

    def options(self, *, stream: bool, **_: Any) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Broken() if stream else broken())


async def broken() -> None:
    raise RayActorError


class Broken:
    async def __aiter__(self) -> AsyncGenerator[None]:
        yield None
        raise RayActorError

    def cancel(self) -> None:
        pass


async def test_a_router_that_goes_away_is_an_error_of_ours_that_says_to_try_again() -> None:
    client = Client(handle=Router())
    with pytest.raises(OverloadedError, match="try again"):
        await client.render_chat([])
    with pytest.raises(OverloadedError, match="try again"):
        async for _ in client.chat_stream([]):
            pass
    with pytest.raises(OverloadedError, match="try again"):
        async for _ in client.generate_stream([1]):
            pass
