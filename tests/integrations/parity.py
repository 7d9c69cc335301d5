"""How an adapter is held against its peer: value, gradient, warnings and errors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Roundings that separate two orders of adding up a few hundred numbers.
ROUNDINGS = 64


class Outcome(NamedTuple):
    error: Exception | None
    warned: list[tuple[type[Warning], str]]
    loss: Tensor | None
    gradient: Tensor | None


def outcome(make: Callable[[], Any], input: Tensor, *arguments: Any) -> Outcome:
    """Build a loss, call it on a fresh leaf and differentiate it; errors are a result."""
    leaf = input.detach().clone().requires_grad_(input.is_floating_point())
    loss, gradient, error = None, None, None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loss = make()(leaf, *arguments)
        except Exception as raised:
            error = raised
    warned = [(w.category, str(w.message)) for w in caught if w.category is UserWarning]
    if error is None and isinstance(loss, Tensor) and loss.requires_grad:
        # Different weights for the elements of an unreduced loss.
        cotangent = torch.linspace(0.5, 1.5, loss.numel()).reshape(loss.shape).to(loss)
        (gradient,) = torch.autograd.grad(loss, leaf, cotangent)
    return Outcome(error, warned, loss, gradient)


def assert_parity(
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    input: Tensor,
    *arguments: Any,
    dtype: torch.dtype | None = None,
    lenient: tuple[str, ...] = (),
) -> None:
    """Check ``ours`` against ``peer``, which computes in ``dtype`` or better.

    Where the peer's result is not finite (0/0) ours need not be, and an error of the peer whose
    message contains one of ``lenient`` need not be one of ours.
    """
    expected = outcome(peer, input, *arguments)
    actual = outcome(ours, input, *arguments)
    if expected.error is not None:
        if any(text in str(expected.error) for text in lenient):
            return
        assert actual.error is not None, f"no error, the peer raised {expected.error!r}"
        assert isinstance(actual.error, type(expected.error)), (
            f"{actual.error!r}, the peer raised {expected.error!r}"
        )
        if isinstance(expected.error, (AssertionError, ValueError)):
            # pytest adds to the message of an assert statement in a module that it rewrites.
            assert str(actual.error).startswith(str(expected.error))
    else:
        assert actual.error is None, f"{actual.error!r}, the peer raised nothing"
        assert actual.warned == expected.warned, f"{actual.warned}, the peer {expected.warned}"
    if expected.loss is not None and not isinstance(expected.loss, Tensor):
        assert actual.loss is not None
        assert float(actual.loss.detach()) == expected.loss
        return
    if expected.loss is None or not bool(torch.as_tensor(expected.loss).isfinite().all()):
        return
    assert actual.loss is not None
    assert actual.loss.shape == expected.loss.shape
    eps = torch.finfo(dtype or input.dtype).eps
    # A large N/D is one whose D has lost as many digits to cancellation.
    size = max(float(expected.loss.detach().abs().max()) if expected.loss.numel() else 0.0, 1.0)
    error = (actual.loss.double() - expected.loss.double()).abs()
    assert bool((error <= ROUNDINGS * eps * size**2).all()), (
        f"loss {actual.loss}, the peer's {expected.loss}"
    )
    if expected.gradient is None or not bool(expected.gradient.isfinite().all()):
        return
    assert actual.gradient is not None
    assert actual.gradient.dtype == expected.gradient.dtype
    largest = max(float(expected.gradient.abs().max()), 1.0)
    error = (actual.gradient.double() - expected.gradient.double()).abs()
    assert bool((error <= ROUNDINGS * eps * size * largest).all()), (
        f"gradient {actual.gradient}, the peer's {expected.gradient}"
    )


def assert_compiles_for_any_size(
    loss: Any, batch: Callable[[int, int], tuple[Tensor, ...]]
) -> None:
    """One graph for the first size and one for any; ``batch`` takes samples and an extent."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for samples, extent in ((2, 5), (3, 6), (5, 4), (4, 8)):
        logits, *others = batch(samples, extent)
        results = []
        for function in (compiled, loss):
            leaf = logits.clone().requires_grad_()
            value = function(leaf, *others)
            results.append((value, *torch.autograd.grad(value.sum(), leaf)))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    assert graphs.frame_count <= 2


class Passes(TorchDispatchMode):
    """Record what the passes over the voxels read and how many other volumes are made.

    A volume is a tensor of 1000 elements or more that is no view of an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.volumes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "voxfuse::soft_confusion":
            if args[0].numel() >= 1000:
                self.seen.append((args[0], args[1]))
        elif isinstance(result, Tensor) and result.numel() >= 1000:
            own = result.untyped_storage().data_ptr()
            given = (a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor))
            self.volumes += all(own != storage for storage in given)
        return result
