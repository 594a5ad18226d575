"""Every example of the README runs as it stands there, against a real application; only the address is another."""

import os
import re
import subprocess
import sys
from pathlib import Path

import ray

from tests.stack.helpers import Application

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"


def example(language: str, holding: str) -> str:
    """The README's one block of a language that holds a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if holding in block]
    return str(found)


def run(*command: str) -> str:
    """The output of an example, run in the project's folder as a program of its own."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def at(application: Application, text: str) -> str:
    assert ADDRESS in text
    return text.replace(ADDRESS, application.url)


def test_the_curl_example_gets_the_answer_that_the_readme_states(whole: Application) -> None:
    output = run("bash", "-c", at(whole, example("sh", "curl")))
    assert '"content":"The circle is red."' in output


def test_the_openai_example_streams_the_description(whole: Application) -> None:
    output = run(sys.executable, "-c", at(whole, example("python", "OpenAI(")))
    assert "green triangle" in output
    assert "yellow star" in output


def test_the_handle_example_renders_and_answers(whole: Application) -> None:
    rendered, answer = run(sys.executable, "-c", example("python", "get_app_handle")).splitlines()
    assert "PlaceholderRange(offset=15, length=64" in rendered
    assert answer == "The circle is red."
