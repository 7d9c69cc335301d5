"""Registration that every operator shares: schemas, backends, fakes and autograd.

An operator lives in three ``torch.library`` namespaces with one schema:

========================  ======================================================================
``voxfuse``               what ``backend="auto"`` runs: the compiled C++ kernel on the CPU (the
                          reference where no library is built), the CUDA kernel or else Triton
                          on a GPU; the reference on Intel's (xpu)
``voxfuse_reference``     the readable PyTorch reference, on any device
``voxfuse_triton``        the Triton kernels: GPU tensors, or CPU tensors under the interpreter
========================  ======================================================================
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from voxfuse.contract import SCHEMAS
from voxfuse.ops import _checks

NAMESPACES = ("voxfuse", "voxfuse_reference", "voxfuse_triton")

#: Apple's GPUs.
NO_MPS = (
    "device: got mps, which has no float64, in which sums are formed; move the tensors to the CPU "
    "(x.cpu()), from where gradients flow back; the fusion takes device='cpu'"
)

_libraries = {name: torch.library.Library(name, "FRAGMENT") for name in NAMESPACES}


def _inputs_of(schema: Any) -> Callable[..., Any]:
    """The type of a tuple of an operator's arguments: the names and defaults of its schema."""
    defaults = [x.default_value for x in schema.arguments if x.has_default_value()]
    names = [x.name for x in schema.arguments]
    kind: Callable[..., Any] = namedtuple("Inputs", names, defaults=defaults)  # type: ignore[misc]
    return kind


def _with_inputs(schema: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function``, which takes one tuple of named arguments, as one of the schema's arguments."""
    inputs_of = _inputs_of(torch._C.parse_schema(schema))
    return lambda *args, **named: function(inputs_of(*args, **named))


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports ``module`` at its first call.

    Triton is imported only when one of its kernels runs: the import is slow, and not every
    machine has it.
    """

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    call.__name__ = name
    return call


def register(
    name: str,
    fake: Callable[[Any], Any],
    *,
    stem: str,
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Declare operator ``name`` in every namespace, with its implementations and its fake.

    ``fake`` gets the arguments as one tuple with the schema's names. Implementations are the
    functions called ``name`` in ``voxfuse.reference.<stem>`` and
    ``voxfuse.triton_kernels.<stem>``. ``vmap`` is the rule under ``torch.func.vmap``, by default
    one call an element.
    """
    schema = name + SCHEMAS[name]
    bound = _with_inputs(schema, fake)
    reference = _lazy(f"voxfuse.reference.{stem}", name)
    triton = _lazy(f"voxfuse.triton_kernels.{stem}", name)
    for namespace, library in _libraries.items():
        # The compiled library declares its operators when it is loaded; a second definition of a
        # schema would raise.
        if not torch._C._dispatch_has_kernel(f"{namespace}::{name}"):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", bound, lib=library)

    for key, implementation in (("CPU", reference), ("CUDA", triton)):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"voxfuse::{name}", key):
            _libraries["voxfuse"].impl(name, implementation, key)
    for key in ("CPU", "CUDA"):
        _libraries["voxfuse_reference"].impl(name, reference, key)
        _libraries["voxfuse_triton"].impl(name, triton, key)
    for namespace in ("voxfuse", "voxfuse_reference"):
        _libraries[namespace].impl(name, reference, "XPU")
    for library in _libraries.values():
        library.impl(name, _refuse_mps, "MPS")
    _register_vmap(name, vmap or one_by_one)


def _refuse_mps(*args: Any) -> None:
    raise RuntimeError(NO_MPS)


def check_device(device: torch.device) -> None:
    """Raise where no backend computes: before a tensor of float64 is made there."""
    if device.type == "mps":
        raise RuntimeError(NO_MPS)


def register_composed(
    name: str,
    signature: str,
    implementation: Callable[..., Any],
    fake: Callable[[Any], Any],
    *,
    vmap: Callable[..., Any] | None = None,
) -> None:
    """Declare an operator that every namespace and device computes by ``implementation``.

    To a compiler it is opaque, so that nothing in it ties a graph to the size of the tensors.
    """
    for namespace, library in _libraries.items():
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"{namespace}::{name}", _with_inputs(name + signature, fake), lib=library
        )
    _register_vmap(name, vmap or one_by_one)


def _register_vmap(name: str, rule: Callable[..., Any]) -> None:
    """Register ``rule(operator, size, in_dims, *args) -> (outputs, out_dims)``.

    Without one PyTorch warns at every call. Operators that write to an argument have none.
    """
    for namespace, library in _libraries.items():
        operator = getattr(getattr(torch.ops, namespace), name).default
        if operator._schema.is_mutable:
            continue

        def bound(info: Any, in_dims: Any, *args: Any, operator: Any = operator) -> Any:
            return rule(operator, info.batch_size, in_dims, *args)

        torch.library.register_vmap(f"{namespace}::{name}", bound, lib=library)


def one_by_one(operator: Any, size: int, in_dims: Any, *args: Any) -> Any:
    """The rule of operators that know no further axis: one call an element."""
    if size == 0:
        raise ValueError(f"in_dims: {operator} has no result for a mapped axis of length 0")
    leaves, structure = pytree.tree_flatten(args)
    dims = pytree.tree_leaves(in_dims)
    results = []
    for i in range(size):
        one = [x if d is None else x.select(d, i) for x, d in zip(leaves, dims, strict=True)]
        results.append(operator(*pytree.tree_unflatten(one, structure)))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(x) for x in zip(*results, strict=True)), (0,) * len(results[0])


def fold_into_batch(operator: Any, size: int, in_dims: Any, *args: Any) -> Any:
    """The rule of operators whose tensors have the samples on their first axis: more samples."""

    def folded(x: Any, dim: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        return x.flatten(0, 1)

    result = operator(*map(folded, args, in_dims))
    return result.unflatten(0, (size, -1) if size else (0, result.shape[0])), 0


def register_autograd(
    name: str,
    setup_context: Callable[..., None],
    backward: Callable[..., dict[str, Any]],
) -> None:
    """Register a formula in every namespace, with arguments and gradients under their names.

    ``setup_context(ctx, inputs, output)`` gets the arguments as a tuple with the schema's names,
    ``backward(operators, ctx, *grads)`` returns gradients by those names; the others have none.
    ``operators`` is the namespace's operator table (``torch.ops.voxfuse`` and so on), so that a
    forward pass on one backend is followed by a backward pass on the same one.
    """
    schema = getattr(torch.ops.voxfuse, name).default._schema
    inputs_of = _inputs_of(schema)
    # Read once: every look into a schema makes Python objects of it.
    names = [x.name for x in schema.arguments]
    lists = [x.name for x in schema.arguments if str(x.type) == "List[Tensor]"]
    defaults = [x.default_value if x.has_default_value() else ... for x in schema.arguments]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # The dispatcher drops defaults at the end, and wants a gradient for all others.
        ctx.passed = len(inputs)
        while ctx.passed and _is_default(inputs[ctx.passed - 1], defaults[ctx.passed - 1]):
            ctx.passed -= 1
        named = inputs_of(*inputs)
        ctx.lists = {name: len(getattr(named, name)) for name in lists}
        setup_context(ctx, named, output)

    for namespace, library in _libraries.items():
        operators = getattr(torch.ops, namespace)

        def bound(ctx: Any, *grads: Any, operators: Any = operators) -> Any:
            none = {name: [None] * length for name, length in ctx.lists.items()}
            gradients = none | backward(operators, ctx, *grads)
            return tuple(map(gradients.get, names[: ctx.passed]))

        torch.library.register_autograd(
            f"{namespace}::{name}", bound, setup_context=setup, lib=library
        )
        transformable = _TRANSFORMABLE[namespace]
        function = _transformable(transformable, name, inputs_of, setup_context, backward)
        setattr(transformable, name, function)


def _is_default(value: Any, default: Any) -> bool:
    if default is ... or isinstance(value, Tensor):
        return False
    return bool(value == default)


class TransformableOperators:
    """A namespace's operators for use inside torch.func transforms.

    There, PyTorch refuses what ``torch.library.register_autograd`` has registered; the same
    formula as an ``autograd.Function`` with ``setup_context`` composes with vmap and grad.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(torch.ops, self.name), name)


_TRANSFORMABLE = {name: TransformableOperators(name) for name in NAMESPACES}


def _transformable(
    operators: TransformableOperators,
    name: str,
    inputs_of: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., dict[str, Any]],
) -> Callable[..., Any]:
    operator = getattr(getattr(torch.ops, operators.name), name).default
    names = [x.name for x in operator._schema.arguments]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs_of(*inputs), output)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_checks.FORWARD_MODE)

    def every(ctx: Any, *grads: Any) -> Any:
        # Here defaults are arguments, which the dispatcher drops, and a list is one of them.
        gradients = backward(operators, ctx, *grads)
        return tuple(map(gradients.get, names))

    function: Any = type(
        f"Transformable_{name}",
        (torch.autograd.Function,),
        {
            "generate_vmap_rule": True,
            "forward": staticmethod(lambda *args: operator(*args)),
            "setup_context": staticmethod(setup),
            "backward": staticmethod(every),
            "jvp": staticmethod(jvp),
        },
    )

    def call(*args: Any, **named: Any) -> Any:
        # setup_context counts on every argument, as the dispatcher hands them over.
        return function.apply(*inputs_of(*args, **named))

    return call


functorch_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: False
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
    check_device(device)
    operators = torch.ops.voxfuse if backend == "auto" else _explicit_namespace(backend, device)
    return _TRANSFORMABLE[operators.name] if functorch_active() else operators


def _explicit_namespace(backend: str, device: torch.device) -> Any:
    from voxfuse._backends import require

    require(backend, device)
    if backend == "reference":
        return torch.ops.voxfuse_reference
    if backend == "triton":
        return torch.ops.voxfuse_triton
    return torch.ops.voxfuse
