"""Packages that scale may need, imported when they are."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, purpose: str, install: str) -> Any:
    """Import a module of an optional package, or say which command brings it.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.split(".")[0]
        if (error.name or "").split(".")[0] != package:
            raise
        raise ImportError(
            f"{purpose} needs {package}: pip install {install}", name=package
        ) from None


def zarr(purpose: str) -> Any:
    """The package zarr, version 3."""
    return require("zarr", purpose, '"voxfuse[zarr]"')
