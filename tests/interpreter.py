"""Triton's interpreter in less than a third of its time.

While a kernel runs in the interpreter, the functions of ``triton.language`` are others. Triton
replaces them before the launch and once more, to the same effect, before every call of a jitted
function inside it, which is half of the time that an interpreted kernel takes.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any


def replace_the_language_once_a_launch() -> None:
    """Does nothing where there is no Triton, or one whose interpreter works otherwise."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang")):
        return
    replace, core = interpreter._patch_lang, interpreter.tl.core
    replaced: set[str] = set()

    @functools.cache
    def languages(function: Any) -> frozenset[str]:
        modules = [x for x in function.__globals__.values() if inspect.ismodule(x)]
        return frozenset(x.__name__ for x in modules if x in (interpreter.tl, core))

    def once(function: Any) -> Any:
        if replaced and languages(function) <= replaced:
            return interpreter._LangPatchScope()  # has nothing to restore
        scope, is_launch = replace(function), not replaced
        replaced.update(languages(function))
        if is_launch:
            restore = scope.restore

            def restored() -> None:
                replaced.clear()
                restore()

            scope.restore = restored
        return scope

    interpreter._patch_lang = once


def remember_types_and_shapes() -> None:
    """Types and shapes are made once and not at every operation: half of the time that is left."""
    try:
        from triton.language import core
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
    except ImportError:
        return
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    broadcast, np_dtype = TritonSemantic.broadcast_impl_value, interpreter._get_np_dtype
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, dict[str, Any]] = {}
    np_dtypes: dict[Any, Any] = {}

    def identity(dtype: Any) -> tuple[Any, ...]:
        scalar = dtype.scalar
        return dtype.name, getattr(scalar, "address_space", None), getattr(scalar, "const", None)

    def new_block(self: Any, element_ty: Any, shape: Any) -> None:
        shape = shape.value if isinstance(shape, core.constexpr) else shape
        sizes = (size.value if isinstance(size, core.constexpr) else size for size in shape)
        key = (*identity(element_ty), *sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        key = identity(type)
        if key not in tensors:
            make_tensor(self, handle, type)
            tensors[key] = dict(vars(self))
        vars(self).update(tensors[key], handle=handle, type=type)

    def broadcast_once(self: Any, lhs: Any, rhs: Any) -> Any:
        same = lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape is rhs.type.shape
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    def known_np_dtype(dtype: Any) -> Any:
        key = identity(dtype)
        if key not in np_dtypes:
            np_dtypes[key] = np_dtype(dtype)
        return np_dtypes[key]

    core.block_type.__init__, core.tensor.__init__ = new_block, new_tensor
    TritonSemantic.broadcast_impl_value = broadcast_once
    interpreter._get_np_dtype = known_np_dtype
