"""The processes of a cluster that this process has started: what memory they take, and which are left over."""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
# A process takes what it needs in its first minute: caches fill, libraries are loaded, pools of memory grow.
SETTLING_S = 60.0
PERIOD_S = 3.0
# Growth is what the last quarter of a process's life has over the first one: this share, and so much for its noise.
GROWTH = 1.1
NOISE_BYTES = 24 * 2**20
ROLES = {
    "engine core": r"engine\.core",
    "raylet": r"/raylet/raylet ",
    "gcs": r"/gcs_server ",
    "": r"ServeReplica:\w+:(\w+)|SERVE_REPLICA::\w+#(\w+)",
    "proxy": r"ProxyActor|SERVE_PROXY|HAProxyManager",
    "haproxy": r"haproxy .*-f ",
    "controller": r"ServeController|SERVE_CONTROLLER",
    "runtime env agent": r"runtime_env.agent|RuntimeEnvAgent",
    "dashboard agent": r"dashboard.agent|DashboardAgent",
    "monitors": r"monitor\.py",
}


@dataclass
class Life:
    """One process as it was seen.

    Attributes:
        pss: Bytes at each look, what is shared with others divided among them.
    """

    role: str
    pid: int
    born: float
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def settled(self) -> list[int]:
        """Its memory once it has settled."""
        return [pss for at, pss in self.samples if at > self.born + SETTLING_S]

    @property
    def quarters(self) -> tuple[float, float] | None:
        """Medians of the first and of the last quarter of its settled life; None where that was too short to tell."""
        settled = self.settled
        quarter = len(settled) // 4
        if quarter < 3:
            return None
        return statistics.median(settled[:quarter]), statistics.median(settled[-quarter:])

    @property
    def grew(self) -> bool:
        quarters = self.quarters
        return quarters is not None and quarters[1] > quarters[0] * GROWTH + NOISE_BYTES


class Census:
    """Looks at the descendants of this process all the time, in a thread, and remembers everyone it has seen."""

    def __init__(self) -> None:
        self.lives: dict[tuple[int, float], Life] = {}
        self._shared_memory: set[Path] = set()
        self._enough = threading.Event()

    @contextmanager
    def taken(self) -> Iterator[Census]:
        thread = threading.Thread(target=self._look_until_enough, name="census", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._enough.set()
            thread.join()

    def look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):  # it may end meanwhile
                key = process.pid, process.create_time()
                life = self.lives.setdefault(key, Life("", *key))
                life.role = role(process) or life.role
                life.samples.append((time.time(), process.memory_full_info().pss))
                self._shared_memory |= _shared_memory_of(process)

    def left_over(self) -> list[Life]:
        """Processes that have lost their parent and live on."""
        family = {process.pid for process in psutil.Process().children(recursive=True)}
        return [life for life in self.lives.values() if life.pid not in family and _lives(life)]

    def alive(self) -> list[Life]:
        return [life for life in self.lives.values() if _lives(life)]

    def left_in_shared_memory(self) -> list[Path]:
        """Files that they had there and that still exist."""
        return sorted(path for path in self._shared_memory if path.exists())

    def by_role(self) -> dict[str, list[Life]]:
        roles: dict[str, list[Life]] = defaultdict(list)
        for life in self.lives.values():
            roles[life.role or "other workers"].append(life)
        return dict(sorted(roles.items()))

    def _look_until_enough(self) -> None:
        while not self._enough.wait(PERIOD_S):
            self.look()


def role(process: psutil.Process) -> str:
    """What a process is, from its command line, where Ray's workers write what they do; empty where it does not say."""
    line = " ".join(process.cmdline())
    for name, pattern in ROLES.items():
        match = re.search(pattern, line)
        if match:
            return name or next(group for group in match.groups() if group)
    return ""


def _shared_memory_of(process: psutil.Process) -> set[Path]:
    """The files of shared memory that a process has mapped or open, and that have a name still."""
    folder = Path("/proc") / str(process.pid)
    names = set(re.findall(rf"{SHARED_MEMORY}/\S+$", (folder / "maps").read_text(), re.MULTILINE))
    names |= {str(link.readlink()) for link in (folder / "fd").iterdir()}
    return {Path(name) for name in names if name.startswith(f"{SHARED_MEMORY}/")}


def _lives(life: Life) -> bool:
    with suppress(psutil.Error):
        process = psutil.Process(life.pid)
        return process.create_time() == life.born and process.status() != psutil.STATUS_ZOMBIE
    return False
