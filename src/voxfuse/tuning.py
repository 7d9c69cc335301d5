"""Measuring the Triton kernels' launch configurations on the GPU at hand."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from voxfuse import _backends
from voxfuse.ops.finalize_slab import finalize_slab

#: Logits (B, C, *spatial) that are measured if none are named: those of the benchmarks.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 2, 512, 512, 512),
    (2, 4, 256, 256, 256),
    (1, 16, 256, 256, 256),
    (1, 117, 128, 128, 128),
    (1, 4, 384, 384, 384),
    (1, 117, 192, 192, 192),
)
DTYPES = (torch.float32, torch.bfloat16)
#: Edge of the patches that are fused, where the volume is as large.
PATCH = 96
#: Slices that are made labels at a time.
SLAB = 48


@dataclasses.dataclass(frozen=True)
class Tuned:
    """One key of the table of launch configurations, as it was measured.

    ``seconds`` holds the median of every configuration of the set, in its order, the default
    first; None for one that cannot run on this GPU. ``chosen`` is the index of the one that is
    used from now on.
    """

    device: str
    key: str
    configurations: tuple[dict[str, int], ...]
    seconds: tuple[float | None, ...]
    chosen: int

    @property
    def speedup(self) -> float:
        """Time of the default over the time of what was chosen."""
        default, chosen = self.seconds[0], self.seconds[self.chosen]
        assert default is not None
        assert chosen is not None
        return default / chosen

    def __str__(self) -> str:
        default, chosen = self.seconds[0], self.seconds[self.chosen]
        assert default is not None
        assert chosen is not None
        line = f"{self.key}: {1e6 * default:.1f} us by default"
        if self.chosen == 0:
            return f"{line}, which stays"
        what = ", ".join(f"{k} {v}" for k, v in self.configurations[self.chosen].items())
        return f"{line}, {1e6 * chosen:.1f} us with {what}"


def tune(
    shapes: Sequence[Sequence[int]] | None = None,
    dtypes: Sequence[torch.dtype] = DTYPES,
    *,
    operators: Sequence[str] = ("soft_confusion", "overlap_add", "finalize_slab"),
    device: torch.device | str = "cuda",
    seconds: float = math.inf,
) -> list[Tuned]:
    r"""Measure the launch configurations of the Triton kernels and keep the fastest.

    Without tuning a kernel's block shapes follow from shape and dtype alone. For every kernel
    family there is a small set of others; this function measures the sets for the given shapes on
    the GPU at hand, with a cold second-level cache and interleaved, and remembers the winners in a
    file, which every later process on this machine reads. The default stays unless another
    configuration is faster by more than the noise and 2 %. What has been measured before is not
    measured again.

    Other block shapes are another order of summation: the last bits of losses may differ from
    those before tuning. From then on they are the same from run to run. Gradients at logits and
    fused volumes keep their bits. ``voxfuse tune --clear`` forgets the winners, and
    ``VOXFUSE_TUNE=0`` ignores them; ``VOXFUSE_TUNE=1`` measures in the course of a program.

    Args:
        shapes: logits (B, C, \*spatial) with 1 to 3 spatial axes: of a loss, and of the volume
            that patches are fused into. By default the benchmarks' shapes. Those that do not fit
            into the free memory are left out.
        dtypes: of the logits: float32, float16, bfloat16 or float64.
        operators: some of "soft_confusion" (the losses), "overlap_add" and "finalize_slab".
        device: a CUDA device.
        seconds: after so many no further shape is begun.

    Returns:
        What was measured.

    Raises:
        ValueError: a shape, an operator or a number of seconds that is not allowed.
        TypeError: a dtype that is not allowed.
        RuntimeError: there is no GPU that Triton can use.

    Example:
        >>> import voxfuse
        >>> for found in voxfuse.tune([(1, 4, 128, 128, 128)]):  # doctest: +SKIP
        ...     print(found)
        soft_confusion float32, 4 classes, labels, softmax, up to 2^21 voxels: 18.2 us by default...
    """
    logits = [_checked_shape(shape) for shape in (SHAPES if shapes is None else shapes)]
    for dtype in dtypes:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise TypeError(
                f"dtypes: got {dtype}, expected float32, float16, bfloat16 or float64 of torch"
            )
    for name in operators:
        if name not in _CALLS:
            raise ValueError(f"operators: got {name!r}, expected some of {', '.join(_CALLS)}")
    if not seconds > 0:
        raise ValueError(f"seconds: got {seconds}, expected a positive number")
    device = torch.device(device)
    _require_gpu(device)
    started = time.monotonic()
    tuning = _table()
    with tuning.measuring() as log:
        for dtype in dtypes:
            for shape in logits:
                for name in operators:
                    if time.monotonic() - started > seconds:
                        break
                    for call in _CALLS[name](shape, dtype, device):
                        call()
                    torch.cuda.empty_cache()
        return [
            Tuned(
                one.device,
                one.key,
                tuple(dict(configuration._asdict()) for configuration in one.configurations),
                one.medians,
                one.chosen,
            )
            for one in log
        ]


def clear() -> Path | None:
    """Forget what was tuned; return the file that was removed, or None if there was none."""
    found: Path | None = _table().clear()
    return found


def information() -> dict[str, Any]:
    """What ``voxfuse info`` says: the file, and whether its table is used on this GPU."""
    tuning = _table()
    found: dict[str, Any] = {"file": str(tuning.cache_file()), "mode": tuning.mode()}
    found |= {"choices": 0, "changed": 0, "error": None}
    try:
        tables = tuning.read_file(tuning.cache_file())
    except tuning.Damaged as error:
        return {**found, "error": str(error)}
    if torch.cuda.is_available() and _backends.triton_error() is None:
        choices = tables.get(tuning.device_name(torch.device("cuda")), {})
        found["choices"] = len(choices)
        found["changed"] = sum(
            choice["configuration"] != choice.get("default") for choice in choices.values()
        )
    return found


def _table() -> Any:
    return importlib.import_module("voxfuse.triton_kernels._tuning")


def _require_gpu(device: torch.device) -> None:
    error = _backends.triton_error()
    if error is None and _backends.interpreting():
        error = "Triton's interpreter is on (TRITON_INTERPRET=1), and has no time to measure"
    if error is None and device.type != "cuda":
        error = f"it is on {device}, and tuning measures on CUDA devices"
    if error is not None:
        raise RuntimeError(f"device: Triton's kernels cannot be measured: {error}")


def _checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    found = tuple(shape)
    if not 3 <= len(found) <= 5 or not all(isinstance(n, int) and n > 0 for n in found):
        raise ValueError(
            f"shapes: got {found}, expected (B, C, *spatial) with 1 to 3 spatial axes, all positive"
        )
    return found


# --- what is measured ----------------------------------------------------------------------------

Calls = Iterator[Callable[[], object]]


def _fits(tensor_bytes: int, device: torch.device) -> bool:
    """Whether the free memory has room for tensors of so many bytes.

    A fifth is left for the clock's buffer and for the allocator.
    """
    return tensor_bytes < 0.8 * torch.cuda.mem_get_info(device)[0]


def _loss_calls(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Calls:
    """Sums and gradient of labels under softmax (under sigmoid for a single class)."""
    batch, classes, *spatial = shape
    # Logits, the gradient and three copies of it while results are compared.
    if not _fits(5 * math.prod(shape) * dtype.itemsize, device):
        return
    logits = torch.empty(shape, dtype=dtype, device=device).normal_()
    labels = torch.randint(0, max(classes, 2), (batch, 1, *spatial), device=device).to(torch.uint8)
    activation = 2 if classes > 1 else 1
    options = (activation, activation, 0, None, 0.0)
    operators = torch.ops.voxfuse_triton
    yield functools.partial(operators.soft_confusion, logits, labels, None, *options, False)
    slopes = torch.rand(batch, classes, 4, dtype=torch.float64, device=device)
    yield functools.partial(
        operators.soft_confusion_backward, slopes, logits, labels, None, *options
    )


def _fusion_calls(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Calls:
    """Fusion of half overlapping patches, the first row of them into a ring, and the gradient."""
    channels, volume = shape[1], list(shape[2:])
    patch = [min(PATCH, n) for n in volume]
    starts = [
        sorted({*range(0, n - p + 1, max(p // 2, 1)), n - p})
        for n, p in zip(volume, patch, strict=True)
    ]
    grid = torch.cartesian_prod(*map(torch.tensor, starts)).view(-1, len(volume))
    weights = [torch.full((1, p), 0.5, dtype=torch.float64) for p in patch]
    operators = torch.ops.voxfuse_triton
    rows = torch.zeros_like(grid)
    whole, fused = len(grid) * channels * math.prod(patch), channels * math.prod(volume)

    def drawn(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_()

    # Beside its inputs a call has its result, and three copies of it while results are compared.
    if _fits((whole + 4 * fused) * dtype.itemsize, device):
        yield functools.partial(
            operators.overlap_add,
            drawn(len(grid), channels, *patch),
            grid,
            rows,
            weights,
            None,
            volume,
        )
    row = grid[grid[:, 0] == 0]
    slots = channels * patch[0] * math.prod(volume[1:])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    needed = len(row) * channels * math.prod(patch) * dtype.itemsize + 4 * slots * wide.itemsize
    if _fits(needed, device):
        yield functools.partial(
            operators.overlap_add_,
            torch.zeros((channels, patch[0], *volume[1:]), dtype=wide, device=device),
            drawn(len(row), channels, *patch),
            row,
            torch.zeros_like(row),
            weights,
            None,
            0,
            0,
            patch[0],
        )
    if _fits((4 * whole + fused) * dtype.itemsize, device):
        yield functools.partial(
            operators.overlap_add_backward, drawn(channels, *volume), grid, rows, weights, None
        )


def _slab_calls(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Calls:
    """Labels and probabilities of some slices of a ring, which is cleared."""
    depth = min(SLAB, shape[2])
    slab = (shape[1], depth, *shape[3:])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not _fits(7 * math.prod(slab) * wide.itemsize, device):
        return
    ring = torch.empty(slab, dtype=wide, device=device).normal_()
    results: tuple[tuple[str, Tensor], ...] = (
        ("labels", torch.empty((1, *slab[1:]), dtype=torch.uint8, device=device)),
        ("values", torch.empty(slab, dtype=dtype, device=device)),
    )
    for mode, out in results:
        yield functools.partial(
            finalize_slab,
            ring,
            out,
            mode,
            stop=depth,
            activation="softmax",
            clear=True,
            backend="triton",
        )


_CALLS: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.device], Calls]] = {
    "soft_confusion": _loss_calls,
    "overlap_add": _fusion_calls,
    "finalize_slab": _slab_calls,
}
