"""Registration that every operator shares: schemas, backends, fakes and autograd.

An operator lives in three ``torch.library`` namespaces with one schema:

========================  ======================================================================
``voxfuse``               what ``backend="auto"`` runs: the compiled C++ kernel on the CPU (the
                          reference where no library is built), the CUDA kernel or else Triton
                          on a GPU
``voxfuse_reference``     the readable PyTorch reference, on any device
``voxfuse_triton``        the Triton kernels: GPU tensors, or CPU tensors under the interpreter
========================  ======================================================================
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACES = ("voxfuse", "voxfuse_reference", "voxfuse_triton")

_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES}

#: Every schema that Python declares, by operator name; tests compare it with the compiled one.
schemas: dict[str, str] = {}


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports ``module`` at its first call.

    Triton is imported only when one of its kernels runs: the import is slow, and not every
    machine has it.
    """

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    call.__name__ = name
    return call


def register(name: str, signature: str, fake: Callable[..., Any], *, stem: str) -> None:
    """Declare operator ``name`` in every namespace, with its implementations and its fake.

    ``signature`` is the schema without the name. Implementations are the functions called
    ``name`` in ``voxfuse.reference.<stem>`` and ``voxfuse.triton_kernels.<stem>``.
    """
    schemas[name] = name + signature
    reference = _lazy(f"voxfuse.reference.{stem}", name)
    triton = _lazy(f"voxfuse.triton_kernels.{stem}", name)
    for namespace, library in _libraries.items():
        # The compiled library declares its operators when it is loaded; a second definition of a
        # schema would raise.
        if not torch._C._dispatch_has_kernel(f"{namespace}::{name}"):
            library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)

    for key, implementation in (("CPU", reference), ("CUDA", triton)):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"voxfuse::{name}", key):
            _libraries["voxfuse"].impl(name, implementation, key)
    for key in ("CPU", "CUDA"):
        _libraries["voxfuse_reference"].impl(name, reference, key)
        _libraries["voxfuse_triton"].impl(name, triton, key)


def register_autograd(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register ``backward(operators, ctx, *grads)`` in every namespace.

    ``operators`` is the namespace's operator table (``torch.ops.voxfuse`` and so on), so that a
    forward pass on one backend is followed by a backward pass on the same one.
    """
    for namespace, library in _libraries.items():
        operators = getattr(torch.ops, namespace)

        def bound(ctx: Any, *grads: Any, operators: Any = operators) -> Any:
            return backward(operators, ctx, *grads)

        torch.library.register_autograd(
            f"{namespace}::{name}", bound, setup_context=setup_context, lib=library
        )


def register_no_double_backward(name: str, why: str) -> None:
    """Make differentiating through the backward operator ``name`` an error that says why.

    Left unregistered, PyTorch would warn and return a wrong second derivative.
    """

    def backward(operators: Any, ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name} cannot be differentiated again: {why}")

    register_autograd(name, lambda ctx, inputs, output: None, backward)


def register_autocast(name: str, count: int) -> None:
    """Under autocast, run ``name`` with its first ``count`` arguments in the autocast dtype.

    ``torch.library.register_autocast`` would cast every floating argument, labels too. As in
    PyTorch, float64 stays.
    """

    def cast(x: Any, dtype: torch.dtype) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64:
            return x.to(dtype)
        return x

    def implementation(namespace: str, device: str, key: str) -> Callable[..., Any]:
        operator = getattr(getattr(torch.ops, namespace), name).default
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def call(_: Any, *args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*(cast(x, dtype) for x in args[:count]), *args[count:])

        return call

    for namespace, library in _libraries.items():
        for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            library.impl(name, implementation(namespace, device, key), key, with_keyset=True)


def namespace_of(backend: str, device: torch.device) -> Any:
    """Return the operator table for ``backend`` on ``device``, or raise with the reason.

    Raises:
        ValueError: ``backend`` is not a known name.
        RuntimeError: the backend is not available for tensors on ``device``.
    """
    if backend == "auto":
        return torch.ops.voxfuse
    return _explicit_namespace(backend, device)


def _explicit_namespace(backend: str, device: torch.device) -> Any:
    from voxfuse._backends import require

    require(backend, device)
    if backend == "reference":
        return torch.ops.voxfuse_reference
    if backend == "triton":
        return torch.ops.voxfuse_triton
    return torch.ops.voxfuse
