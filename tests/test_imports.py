"""Imports go one way: deployments -> engine -> renderer, or a render replica would come to hold model weights."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "renderer": {"engine", "deployments", "ray", "fastapi", "starlette", "uvicorn"},
    "engine": {"deployments", "ray", "fastapi", "starlette", "uvicorn"},
    "deployments": {"demo", "bench", "tests"},
}
SOURCES = [path for package in FORBIDDEN for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(path: Path) -> Iterator[str]:
    """Top-level names of every import in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_the_packages_below_its_own(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert set(imported_packages(path)) & FORBIDDEN[package] == set()


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("renderer.renderer", ["engine", "ray", "fastapi", "starlette"]),
        ("engine.embedded", ["ray", "fastapi", "starlette", "deployments"]),
        ("deployments.render_replica", ["engine.core", "engine.model", "engine.embedded"]),
    ],
)
def test_importing_a_module_loads_nothing_that_it_must_not_hold(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
