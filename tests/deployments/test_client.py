"""The client without an application."""

import subprocess
import sys

PROGRAM = """
import sys
import deployments.client
heavy = {"torch", "transformers"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_a_program_that_imports_the_client_loads_no_model_library() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
