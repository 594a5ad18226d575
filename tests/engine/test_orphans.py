"""What a killed process had started ends, and what those had started."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

SLEEPS = "import time; time.sleep(60)"
STARTS_ONE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print("grandchild", child.pid, flush=True)
time.sleep(60)
"""
STARTS_TWO = f"""
import subprocess, sys, time
from engine.orphans import end_children_with_me
earlier = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], stdout=subprocess.DEVNULL)
end_children_with_me()
child = subprocess.Popen([sys.executable, "-c", {STARTS_ONE!r}, {SLEEPS!r}])
print("earlier", earlier.pid, flush=True)
print("child", child.pid, flush=True)
time.sleep(60)
"""


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_children_and_theirs_end_when_their_starter_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTS_TWO], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        started = {line.split()[0]: int(line.split()[1]) for line in (starter.stdout.readline() for _ in range(3))}
        assert all(map(lives, started.values()))
        starter.kill()
        starter.wait()
    deadline = time.monotonic() + 30
    while lives(started["child"]) or lives(started["grandchild"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert lives(started["earlier"])
    psutil.Process(started["earlier"]).kill()
