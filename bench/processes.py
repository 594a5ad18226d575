"""What a server and everything that it started spends on the processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class TreeTime:
    """Seconds of processor time of every process of a tree, by process id and start."""

    seconds: Mapping[tuple[int, float], float]

    def since(self, earlier: TreeTime) -> float:
        """Seconds spent since an earlier reading. Of a process that has ended in the meantime nothing is known."""
        return sum(now - earlier.seconds.get(process, 0.0) for process, now in self.seconds.items())


def tree_time(pid: int) -> TreeTime:
    """A reading of the process and of all its descendants, user and system time of all their threads."""
    root = psutil.Process(pid)
    readings: dict[tuple[int, float], float] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            times = process.cpu_times()
            readings[process.pid, process.create_time()] = times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return TreeTime(readings)


def command_line(pid: int, program: str) -> list[str]:
    """The arguments of the descendant that runs a program; empty where none does."""
    for process in psutil.Process(pid).children(recursive=True):
        try:
            arguments = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if arguments and arguments[0].rpartition("/")[2] == program:
            return arguments
    return []
