"""Processes that share a loss or a metric: sums over them, and values of all in one place."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxfuse.ops._registry import functorch_active


class Ranks(NamedTuple):
    """Processes whose sums are added up."""

    group: Any
    average: bool

    @property
    def size(self) -> int:
        import torch.distributed

        return torch.distributed.get_world_size(self.group)


def ranks_of(process_group: Any, ddp_average: bool) -> Ranks | None:
    """Resolve ``process_group``: None, "world" or a torch.distributed process group."""
    if process_group is None:
        return None
    import torch.distributed

    if not isinstance(process_group, str):
        return Ranks(process_group, ddp_average)
    if process_group != "world":
        raise ValueError(
            f"process_group: got {process_group!r}, expected None, 'world' or a process group"
        )
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            "process_group: 'world' needs torch.distributed.init_process_group() before the first "
            "forward"
        )
    return Ranks(torch.distributed.group.WORLD, ddp_average)


def refuse_tracing() -> None:
    """Raise where values of other ranks' voxels cannot be had."""
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "process_group: losses that sort or choose voxels over ranks exchange their numbers"
            " through the host, which torch.compile cannot trace; compile the network alone"
        )
    refuse_function_transforms()


def refuse_function_transforms() -> None:
    if functorch_active():
        raise RuntimeError(
            "process_group: ranks cannot add up their sums inside torch.func transforms; use "
            "torch.autograd"
        )


def total_over_ranks(stats: Tensor, batch: bool, ranks: Ranks) -> Tensor:
    """Add up the sums of all ranks: pooled over the global batch, or sample by sample."""
    import torch.distributed

    total = stats.sum(0, keepdim=True) if batch else stats.clone()
    torch.distributed.all_reduce(total, group=ranks.group)
    return total


class _Total(torch.autograd.Function):
    """The value of the one and the gradient of the other, which may be infinite."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, total: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def sum_over_ranks(stats: Tensor, batch: bool, ranks: Ranks) -> Tensor:
    """Sum over ranks whose gradient is that of one process holding the whole batch.

    The autograd of an all-reduce would add up the ranks' gradients and so count the loss, which
    every rank computes, once a rank. The gradient therefore flows through this rank's own sums.
    """
    refuse_function_transforms()
    total = total_over_ranks(stats.detach(), batch, ranks)
    own = stats.sum(0, keepdim=True) if batch else stats
    if ranks.average:
        own = own * ranks.size
    result: Tensor = _Total.apply(own, total)  # type: ignore[no-untyped-call]
    return result


def share_of_rank(grad: Tensor, samples: int, ranks: Ranks) -> Tensor:
    """The slopes at this rank's own sums: no collective, every rank has the whole loss."""
    if ranks.average:
        grad = grad * ranks.size
    return grad.expand(samples, -1, -1).contiguous()


class Gathering:
    """Brings (rows, n) values of all ranks into one place, n differing from rank to rank.

    The numbers n travel through the host, once. Every rank gets all values, in the order of the
    ranks.
    """

    def __init__(self, rows: int, own: int, device: torch.device, ranks: Ranks) -> None:
        import torch.distributed

        self.ranks = ranks
        sizes = [torch.empty(2, dtype=torch.int64, device=device) for _ in range(ranks.size)]
        mine = torch.tensor([rows, own], dtype=torch.int64, device=device)
        torch.distributed.all_gather(sizes, mine, group=ranks.group)
        self.rows = [int(x[0]) for x in sizes]
        self.counts = [int(x[1]) for x in sizes]

    def with_counts(self, counts: list[int]) -> Gathering:
        """The same ranks with other numbers of values, which every rank knows."""
        other = copy.copy(self)
        other.counts = counts
        return other

    @property
    def own(self) -> slice:
        """Where this rank's values lie among all."""
        import torch.distributed

        rank = torch.distributed.get_rank(self.ranks.group)
        before = sum(self.counts[:rank])
        return slice(before, before + self.counts[rank])

    def __call__(self, values: Tensor) -> Tensor:
        """Return the values of all ranks, (rows, sum of n)."""
        import torch.distributed

        rows, count = values.shape
        carried = values.to(torch.uint8) if values.dtype == torch.bool else values
        # all_gather takes equal shapes only.
        padded = carried.new_zeros(rows, max(self.counts))
        padded[:, :count] = carried
        parts = [torch.empty_like(padded) for _ in self.counts]
        torch.distributed.all_gather(parts, padded, group=self.ranks.group)
        joined = torch.cat([p[:, :n] for p, n in zip(parts, self.counts, strict=True)], 1)
        return joined.to(values.dtype)
