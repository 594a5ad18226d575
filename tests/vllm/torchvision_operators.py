"""Lets torchvision be imported beside a torch that its own operators were not built for.

The registry's torchvision is built for CUDA; beside a CPU build of torch its shared library does not load, and its
import stops at the missing schema of an operator. Nothing that vLLM asks of it calls that operator, so the schemas are
enough. `setup.sh` installs this module into the virtual environment, where a `.pth` file imports it in every process:
vLLM's own processes need it too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[object] = []


class _Finder(MetaPathFinder):
    """Finds torchvision as Python does, and sees to it that the schemas are there before it is executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        _define_missing()
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)


def _define_missing() -> None:
    torch: Any = importlib.import_module("torch")
    if torch.version.cuda is not None or _loads():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _kept.append(library)


def _loads() -> bool:
    """Whether torchvision's shared library fits this torch."""
    torch: Any = importlib.import_module("torch")
    library = importlib.util.find_spec("torchvision._C") if "torchvision" in sys.modules else None
    if library is None or library.origin is None:
        return False
    try:
        torch.ops.load_library(library.origin)
    except OSError:
        return False
    return True


sys.meta_path.insert(0, _Finder())
