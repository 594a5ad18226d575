"""Every program of docs/examples runs as it stands there, as a driver of its own on the same cluster."""

from __future__ import annotations

import re
import sys

import pytest

from tests.stack.helpers import Application
from tests.stack.test_readme import run

RED = "demo/images/red_circle.png"


@pytest.fixture
def app(whole: Application) -> Application:
    whole.clear()
    return whole


def example(name: str, *arguments: str) -> str:
    return run(sys.executable, f"docs/examples/{name}.py", *arguments)


def test_prompts_are_rendered_with_bounded_concurrency_and_a_progress_bar(app: Application) -> None:
    output = example("render_many", "--prompts", "20", "--concurrency", "6")
    assert "rendered" in output
    assert re.search(r"^20 prompts, \d+ tokens, [\d.]+ MB of tensors$", output, re.MULTILINE)


def test_an_answer_is_streamed(app: Application) -> None:
    assert example("stream", RED, "What colour is the shape?") == "The circle is red.\n"


def test_rollouts_of_three_turns_keep_their_ids_and_tensors(app: Application) -> None:
    lines = example("rl_loop", "--rollouts", "2").splitlines()
    assert len(lines) == 2
    for line in lines:
        found = re.fullmatch(r"(\d+) ids, (\d+) generated, reward [01].0, images \[(.*)\]", line)
        assert found is not None, line
        assert int(found[1]) > int(found[2]) > 0
        assert found[3].count("1176") == 3


def test_a_trainer_gets_the_tensors_of_the_engine_uncopied(app: Application) -> None:
    output = example("trainer", "--pictures", "3")
    assert re.fullmatch(r"3 samples, \d+ tokens to learn, \d+ patches of 3 images\n", output)


def test_tensors_come_over_http_without_base64(app: Application) -> None:
    places, tensors = example("render_msgpack", app.url, RED).splitlines()
    assert places.endswith("[{'offset': 15, 'length': 64}]")
    assert tensors == "{'pixel_values': ('uint8', (256, 1176)), 'image_grid_thw': ('int64', (3,))}"
