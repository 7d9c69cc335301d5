"""Compile one Triton kernel ahead of time for a GPU that is not there."""

from __future__ import annotations

import dataclasses
from typing import Any

#: GPUs of AMD's, a data centre's and a desktop's, and the lanes of their waves.
AMD = {"gfx942": 64, "gfx1100": 32}


@dataclasses.dataclass
class Instance:
    """A kernel with the types and compile-time values of its parameters.

    A type is Triton's word for it, or None or 1 for what Triton compiles in; of a parameter that is
    a tuple, a tuple with the same names. ``multiples_of_16`` are parameters, or fields of such a
    tuple as "parameter.field".
    """

    kernel: Any
    constants: dict[str, Any]
    types: dict[str, Any]
    num_warps: int = 4
    multiples_of_16: tuple[str, ...] = ()
    registers: int | None = None  # that the launch allows a thread, on NVIDIA


def compile_instance(instance: Instance, capability: int | str) -> dict[str, Any]:
    """What the compiler makes of a kernel, by the name of the stage."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS

    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = dict(instance.constants)
    attributes: dict[tuple[int, ...], Any] = {}

    def declared(kind: Any, name: str, path: tuple[int, ...]) -> Any:
        if isinstance(kind, tuple):
            fields = kind._fields  # type: ignore[attr-defined]
            inner = (
                declared(kind[i], f"{name}.{field}", (*path, i)) for i, field in enumerate(fields)
            )
            return type(kind)(*inner)
        if not isinstance(kind, str):
            # What Triton does with None and with integers that are 1.
            constants[path] = kind
            return "constexpr"
        if kind.startswith("*") or name in instance.multiples_of_16:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for position, name in enumerate(instance.kernel.arg_names):
        if name in instance.constants:
            signature[name] = "constexpr"
        else:
            signature[name] = declared(instance.types.get(name, "i32"), name, (position,))
    if isinstance(capability, str):
        target, limit = GPUTarget("hip", capability, AMD[capability]), {}
    else:
        target = GPUTarget("cuda", capability, 32)
        limit = {} if instance.registers is None else {"maxnreg": instance.registers}
    source = ASTSource(instance.kernel, signature, constants, attributes)
    compiled = triton.compile(
        source,
        target=target,
        options={"num_warps": instance.num_warps, **LAUNCH_OPTIONS, **limit},
    )
    stages: dict[str, Any] = compiled.asm
    return stages
