"""Triton's interpreter, made to replace its language once a launch instead of at every call.

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
