"""Host arithmetic: the compiled module where it was built, its NumPy twin where it was not."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from voxfuse.reference import windows as _numpy


def _load() -> ModuleType:
    if os.environ.get("VOXFUSE_LIBRARY", "1") == "0":
        return _numpy
    try:
        return importlib.import_module("voxfuse._host")
    except ImportError:
        return _numpy


host = _load()
