"""Processor time of a tree of processes."""

import subprocess
import sys

from bench.processes import command_line, tree_time

SPIN = "import time\nbegun = time.process_time()\nwhile time.process_time() - begun < 0.5: pass\ninput()"
PARENT = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {SPIN!r}, '--mark'])"


def test_a_descendants_time_counts() -> None:
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        before = tree_time(parent.pid)
        while tree_time(parent.pid).since(before) < 0.5:
            assert parent.poll() is None
        program = sys.executable.rpartition("/")[2]
        assert command_line(parent.pid, program)[-1] == "--mark"
        assert command_line(parent.pid, "no-such-program") == []
        parent.communicate("")
