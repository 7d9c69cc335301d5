"""The end of every forward reduction: adding up what the programs of a sample have summed.

``slots`` programs a sample leave a *row* of ``count`` float64 numbers each, in
``partial[slot, sample, :]``. The last program of a *group* of rows adds them up, into the first of
them, and the last of those programs adds up the groups. Which one comes last is told by counting,
with integers; the order of the additions follows from the shape alone, so the bits are the same
whichever it is. Where there are no counters, a second kernel (``finish``) does the same.
"""

import math
import threading
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, power_of_two
from voxfuse.triton_kernels.views import constexprs

#: Numbers that one program adds up about as fast as two levels of programs would.
ONE_LEVEL = 2048
#: Numbers that a thread reads at once, and rows: no group of soft_confusion has more.
NUMBERS_A_THREAD, ROWS_AT_ONCE = 8, 64
#: Counters of one stream, if it asks for no more, and of all streams and graphs of a device.
STREAM_COUNTERS, COUNTERS = 512, 1 << 15
#: Counters come in multiples of this, so that their addresses are multiples of 16 bytes: for
#: others the kernels would be compiled a second time.
COUNTER_MULTIPLE = 4


class RowViews(NamedTuple):
    """Where the programs of a launch leave their rows and count themselves, and where the sums go.

    On the host these are tensors, in a kernel pointers.
    """

    partial: torch.Tensor
    result: torch.Tensor
    counters: torch.Tensor


class RowShape(NamedTuple):
    """How many rows, 2 ** ``LEVELS``, and how many numbers of each are read at once."""

    LEVELS: int
    COLUMNS: int


@triton.jit
def stack(xs, LEVELS: tl.constexpr):
    """Join a tuple of 2 ** LEVELS tensors of one shape along a new last axis (kept factorised)."""
    for level in tl.static_range(LEVELS):
        ys = ()
        for i in tl.static_range(1 << (LEVELS - 1 - level)):
            ys = ys + (tl.join(xs[i], xs[i + (1 << (LEVELS - 1 - level))]),)
        xs = ys
    return xs[0]


@triton.jit
def _pairwise_sum(x, LEVELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sum over the 2 ** LEVELS rows of ``x``: the second half is added to the first, and
    so on. Spelt out, because the order of ``tl.sum`` depends on who holds what.
    """
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [2, 1 << (LEVELS - 1 - level), COLUMNS]), axis=0)
    return tl.reshape(x, [COLUMNS])


@triton.jit
def _add_rows(source, stride, rows, target, count, ROWS: tl.constexpr):
    """``target[i]`` = sum over r < ``rows`` of ``source[r * stride + i]`` for i < ``count``."""
    AT_ONCE: tl.constexpr = 1 << ROWS.LEVELS
    for first in range(0, count, ROWS.COLUMNS):
        column = first + tl.arange(0, ROWS.COLUMNS)
        sums = tl.zeros([ROWS.COLUMNS], tl.float64)
        for start in range(0, rows, AT_ONCE):
            row = start + tl.arange(0, AT_ONCE)[:, None]
            place = source + row * stride + column[None, :]
            mask = (row < rows) & (column[None, :] < count)
            # Other multiprocessors have written them: not from this one's first-level cache.
            x = tl.load(place, mask=mask, other=0.0, cache_modifier=".cg")
            sums += _pairwise_sum(x, ROWS.LEVELS, ROWS.COLUMNS)
        tl.store(target + column, sums, mask=column < count)


@triton.jit
def _comes_last(counter, total):
    """Whether this program is the last of ``total`` to come here. What the others wrote before is
    then visible to it; the counter is 0 again.

    One thread counts, for all. The barrier before it puts the stores of the other threads before
    its atomic addition, which releases them at the scope of the GPU (release is cumulative) and
    acquires what the programs that came before have released. The sum reaches the other threads
    through shared memory and behind a barrier, so that whatever they read afterwards comes later
    still: in NVIDIA's memory model every row has then happened before it is read here.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def row_of_program(views, count):
    """Where this program, the slot and the sample of its two indices, leaves its row."""
    slot, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    return views.partial + (slot * tl.num_programs(1) + sample) * count


@triton.jit
def finish_rows(views, count, group, ROWS: tl.constexpr):
    """End a forward kernel whose program (slot, sample) has written its row of ``count`` numbers.

    ``group`` is the number of rows in a group; 0: nothing is to be added up, or not here.
    """
    if group > 0:
        sample = tl.program_id(1).to(tl.int64)
        slots = tl.num_programs(0)
        stride = tl.num_programs(1).to(tl.int64) * count
        groups = tl.cdiv(slots, group)
        partial = views.partial + sample * count
        result = views.result + sample * count
        own = tl.program_id(0) // group
        source = partial + own * group * stride
        rows = tl.minimum(slots - own * group, group)
        target = source
        counter = views.counters + sample * (groups + 1)
        counter_of_own = counter + 1 + own
        levels = 2
        if groups == 1:
            target = result
            counter_of_own = views.counters + sample
            levels = 1
        while levels > 0:
            if _comes_last(counter_of_own, rows):
                _add_rows(source, stride, rows, target, count, ROWS)
                # Then, if there are several groups, their sums.
                source = partial
                stride *= group
                rows = groups
                target = result
                counter_of_own = counter
                levels -= 1
            else:
                levels = 0


@triton.jit(do_not_specialize=["slots", "count", "group"])
def finish(partial, result, slots, count, group, ROWS: tl.constexpr):
    """What the last programs do, for ROWS.COLUMNS of a sample's numbers, in the same order."""
    first = tl.program_id(0) * ROWS.COLUMNS
    sample = tl.program_id(1).to(tl.int64)
    stride = tl.num_programs(1).to(tl.int64) * count
    partial += sample * count + first
    result += sample * count + first
    width = tl.minimum(count - first, ROWS.COLUMNS)
    groups = tl.cdiv(slots, group)
    for own in range(groups):
        rows = tl.minimum(slots - own * group, group)
        place = partial + own * group * stride
        _add_rows(place, stride, rows, place, width, ROWS)
    # Other threads of this program have written some of what is read now.
    tl.debug_barrier()
    _add_rows(partial, group * stride, groups, result, width, ROWS)


# --- launches ------------------------------------------------------------------------------------


class _Counters:
    """Counters of one device, all 0 between launches."""

    def __init__(self, device: torch.device) -> None:
        self.all = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        self.taken = 0
        self.of_stream: dict[int, torch.Tensor] = {}
        if device.type == "cuda":
            # Streams and graphs that start later must find the zeros; this once they wait.
            torch.cuda.synchronize(device)

    def take(self, count: int) -> torch.Tensor | None:
        size = math.ceil(count / COUNTER_MULTIPLE) * COUNTER_MULTIPLE
        if self.taken + size > COUNTERS:
            return None
        self.taken += size
        return self.all[self.taken - size : self.taken]


_devices: dict[torch.device, _Counters] = {}
_lock = threading.Lock()


def counters_for(device: torch.device, count: int) -> torch.Tensor | None:
    """``count`` counters that no launch uses beside the next one on ``device``, which must be the
    current device; None if there are none.

    A stream has its own, for its launches follow each other. A launch that is being captured gets
    some for good, because graphs run beside the stream and beside each other.
    """
    on_gpu = device.type == "cuda"
    # Before the barrier in _comes_last, what Triton compiles for AMD waits for shared memory alone,
    # not for stores; what it compiles for Intel has not been looked at.
    if (on_gpu and torch.version.hip is not None) or device.type not in ("cuda", "cpu"):
        return None
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    with _lock:
        counters = _devices.get(device)
        if counters is None:
            if capturing:
                return None
            counters = _devices[device] = _Counters(device)
        if capturing:
            return counters.take(count)
        stream = torch.cuda.current_stream(device).stream_id if on_gpu else 0
        own = counters.of_stream.get(stream)
        if own is None or len(own) < count:
            own = counters.take(max(STREAM_COUNTERS, power_of_two(count)))
            if own is not None:
                counters.of_stream[stream] = own
        return own


class Rows:
    """The rows of one launch: where they go, and how they are added up into ``result``.

    To be made and used where the launch's device is the current one. ``result`` is float64, its
    first axis the samples; ``slots`` programs of ``num_warps`` warps add up each of them. A kernel
    that ends in ``finish_rows`` takes ``views``, ``group`` and ``shape``.
    """

    def __init__(self, result: torch.Tensor, slots: int, num_warps: int) -> None:
        self.slots, self.num_warps = slots, num_warps
        samples = len(result)
        self.count = result.numel() // samples
        self.shape = constexprs(shape_of_rows(self.count, num_warps))
        self.rows_of_a_group, self.in_kernel = slots, False
        # Without counters something of their type, which is not touched.
        partial, counters = result, result.view(torch.int32)
        if slots > 1:
            size = result.numel() * slots
            partial = torch.empty(size, dtype=torch.float64, device=result.device)
            self.rows_of_a_group = rows_of_a_group(slots, samples, self.count)
            needed = counters_needed(slots, samples, self.rows_of_a_group)
            found = counters_for(result.device, needed)
            if found is not None:
                counters, self.in_kernel = found, True
        self.views = RowViews(partial, result, counters)

    @property
    def group(self) -> int:
        """Rows of a group, as the kernel is to know them: 0 if it is to add up nothing."""
        return self.rows_of_a_group if self.in_kernel else 0

    def finish(self) -> None:
        """Add up the rows if the kernel could not."""
        if self.slots == 1 or self.in_kernel:
            return
        partial, result, _ = self.views
        finish[(triton.cdiv(self.count, int(self.shape.COLUMNS)), len(result))](
            partial,
            result,
            self.slots,
            self.count,
            self.rows_of_a_group,
            self.shape,
            num_warps=self.num_warps,
            **LAUNCH_OPTIONS,
        )


def shape_of_rows(count: int, num_warps: int) -> RowShape:
    """What is read at once of rows of ``count`` numbers."""
    columns = min(power_of_two(count), 32 * num_warps)
    rows = min(NUMBERS_A_THREAD * 32 * num_warps // columns, ROWS_AT_ONCE)
    return RowShape(rows.bit_length() - 1, columns)


def rows_of_a_group(slots: int, samples: int, count: int) -> int:
    """Groups and the rows of one are about as many, unless there are few numbers or counters."""
    if slots * count <= ONE_LEVEL:
        return slots
    group = math.ceil(math.sqrt(slots))
    while group < slots and counters_needed(slots, samples, group) > STREAM_COUNTERS:
        group *= 2
    return min(group, slots)


def counters_needed(slots: int, samples: int, group: int) -> int:
    """One for every sample and, if there are several, one for each of its groups."""
    return samples if group == slots else samples * (triton.cdiv(slots, group) + 1)
