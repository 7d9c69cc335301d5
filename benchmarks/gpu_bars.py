"""The bars that the GPU kernels are held to, each measured and compared with its limit.

``python benchmarks/gpu_bars.py {loss,small,large,fusion,head,warm} --device cuda --json FILE``

Every result is checked before it is timed. A wrong one of this package ends the run with exit
status 3; a wrong peer is left out and named. Peers run in the same process, interleaved, on the
same tensors. On a GPU the clock is a pair of events behind a read of a buffer larger than any
second-level cache and of a pause, which hide the launches; where a bar speaks of wall time, it is
the processor's clock around a synchronised call. ``--device cpu`` runs the same steps on small
shapes.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import voxfuse
from benchmarks import byte_model, harness, head_benchmark, losses
from benchmarks.gpu_run import (
    Bar,
    Call,
    Run,
    WrongResult,
    copy_ceiling,
    free,
    median_ms,
    wall_seconds,
)

WRONG_RESULT = 3
GPU_SHAPES = byte_model.LOSS_SHAPES
CPU_SHAPES = [(1, 2, 24, 24, 24), (1, 5, 16, 16, 16)]
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


# --- the loss ------------------------------------------------------------------------------------


def plain_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """TP, FP and FN (B, C, 3) of a softmax in plain PyTorch."""
    p = logits.softmax(1)
    g = torch.zeros_like(p).scatter_(1, labels.long(), 1)
    axes = tuple(range(2, p.ndim))
    return torch.stack([(p * g).sum(axes), (p * (1 - g)).sum(axes), ((1 - p) * g).sum(axes)], -1)


def tversky_of(sums: Tensor) -> Tensor:
    tp, fp, fn = sums.unbind(-1)
    s = losses.SMOOTH
    return (1 - (tp + s) / (tp + losses.ALPHA * fp + losses.BETA * fn + s)).mean()


class Truth:
    """The loss and its gradient in float64 plain PyTorch, a slab of the volume at a time."""

    def __init__(self, logits: Tensor, labels: Tensor, slab_bytes: int = 1 << 30) -> None:
        self.logits, self.labels = logits, labels
        slice_bytes = 8 * logits[:, :, :1].numel()
        self.depth = max(1, slab_bytes // slice_bytes)
        total = sum(plain_sums(z.double(), y) for z, y, _ in self.slabs())
        assert isinstance(total, Tensor)
        total.requires_grad_()
        value = tversky_of(total)
        (self.cotangent,) = torch.autograd.grad(value, total)
        self.value = value.item()

    def slabs(self) -> Iterator[tuple[Tensor, Tensor, slice]]:
        for first in range(0, self.logits.shape[2], self.depth):
            part = slice(first, first + self.depth)
            yield self.logits.detach()[:, :, part], self.labels[:, :, part], part

    def errors(self, value: Tensor, gradient: Tensor) -> tuple[float, float]:
        """Error of the value, relative where it is above 1, and of the gradient over its largest.

        NaN counts as infinitely wrong.
        """
        error = largest = 0.0
        for z, y, part in self.slabs():
            z = z.double().requires_grad_()
            (true,) = torch.autograd.grad((plain_sums(z, y) * self.cotangent).sum(), z)
            difference = (gradient[:, :, part].double() - true).abs().max().item()
            error = math.inf if math.isnan(difference) else max(error, difference)
            largest = max(largest, true.abs().max().item())
        off = abs(value.item() - self.value) / max(1.0, abs(self.value))
        return math.inf if math.isnan(off) else off, error / largest


def peers_of(run: Run) -> dict[str, losses.Loss]:
    """The peers; the compiled ones in a form of their own for every shape, their fastest."""
    found, missing = losses.tversky_peers(
        {"reference", *run.options.peers}, ("one-hot", "comparison", "nnunet"), dynamic=False
    )
    run.missing |= missing
    return {name: losses.in_float32(loss) for name, loss in found.items()}


def check_loss(run: Run, name: str, loss: losses.Loss, truth: Truth) -> None:
    """Raise WrongResult unless value and gradient are right to float32 and one rounding."""
    value, gradient = losses.value_and_gradient(loss, truth.logits, truth.labels)
    if run.options.inject_wrong_result:
        gradient.view(-1)[0] += gradient.abs().max()
    off, error = truth.errors(value, gradient)
    half = truth.logits.dtype != FLOAT32
    if off > 1e-5 or error > (4e-3 if half else 1e-4):
        raise WrongResult(
            f"{name}, logits {tuple(truth.logits.shape)} {truth.logits.dtype}: the loss is off by "
            f"{off:.2e}, the gradient by {error:.2e} of its largest value"
        )


def right_peers(run: Run, peers: dict[str, losses.Loss], truth: Truth) -> dict[str, losses.Loss]:
    """The peers that run here and compute the same loss (nnU-Net's Dice is another one)."""
    kept = {}
    for name, loss in peers.items():
        where = f"{name} at {tuple(truth.logits.shape)}"
        try:
            value, gradient = losses.value_and_gradient(loss, truth.logits, truth.labels)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            run.missing[where] = str(error).splitlines()[0][:200]
            continue
        if "nnunet" not in name:
            off, wrong = truth.errors(value, gradient)
            if off > 2e-3 or wrong > 1e-2:
                run.missing[where] = f"wrong: loss off by {off:.1e}, gradient by {wrong:.1e}"
                continue
        kept[name] = loss
    return kept


def loss_case(run: Run, shape: tuple[int, ...], dtype: torch.dtype, ceiling: float) -> None:
    """Gate, time and weigh one shape, and add its bars."""
    type_name = str(dtype).split(".")[-1]
    case = f"({', '.join(map(str, shape))}) {type_name}"
    logits, labels = losses.draw(shape, dtype, run.device)
    truth = Truth(logits, labels)
    own = {}
    for name in run.backends:
        with run.alone(f"{name}, {case}"):
            check_loss(run, name, losses.own_loss(name), truth)
            own[name] = losses.own_loss(name)
    if not own:
        not_measured(run, shape, dtype, "every backend failed")
        return
    peers = right_peers(run, peers_of(run), truth)
    del truth
    free(run)

    leaf = logits.detach().requires_grad_()
    functions = {name: losses.step(loss, leaf, labels) for name, loss in {**own, **peers}.items()}
    target = torch.empty_like(logits)
    functions["copy of the logits"] = lambda: target.copy_(logits)
    clock = run.clock()
    rows = median_ms(harness.interleave(functions, clock, run.rounds, 15.0))
    target = torch.empty(0)
    floor = byte_model.tversky_floor(shape, dtype, labels.element_size())
    result: dict[str, Any] = {
        "case": case,
        "floor_bytes": floor,
        "copy_bytes_per_second": ceiling,
        "rows": rows,
        "achieved": {},
        "peak_extra_bytes": {},
    }
    gradient_bytes = logits.numel() * logits.element_size()
    for name in own:
        speed = floor / (rows[name]["median_ms"] / 1e3)
        result["achieved"][name] = speed
        peak = harness.peak_extra_bytes(functions[name], run.device) - gradient_bytes
        result["peak_extra_bytes"][name] = peak
        run.bars.append(Bar(f"{name}: bytes/s over copy", case, 0.75, speed / ceiling))
        what = f"{name}: memory above logits and gradient, MiB"
        run.bars.append(Bar(what, case, 1.0, peak / 2**20, at_least=False))
    best = max(result["achieved"].values()) / ceiling
    limit = 0.9 if dtype == FLOAT32 else 0.8
    run.bars.append(Bar("better backend: bytes/s over copy", case, limit, best))
    fastest = min(rows[name]["median_ms"] for name in own)
    compiled = {
        "torch.compile of plain PyTorch": ["compile-one-hot", "compile-comparison"],
        "torch.compile of nnU-Net's Dice": ["compile-nnunet"],
    }
    for peer, limit, names in (
        ("MONAI", 10.0, ["monai"]),
        *((peer, 1.5, names) for peer, names in compiled.items()),
    ):
        times = [rows[name]["median_ms"] for name in names if name in rows]
        ratio = min(times) / fastest if times else None
        note = "" if times else "not measured: the peer is missing"
        run.bars.append(Bar(f"time of {peer} over ours", case, limit, ratio, note=note))
    run.results.append(result)
    print(f"\n{case}: floor {floor / 1e6:.1f} MB, {best:.1%} of copy")
    for name, row in rows.items():
        print(
            f"  {name:<22}{row['median_ms']:>10.4f} ms  p20 {row['p20_ms']:.4f} p80 "
            f"{row['p80_ms']:.4f}  x{row['median_ms'] / fastest:.2f}"
        )


def not_measured(run: Run, shape: tuple[int, ...], dtype: torch.dtype, why: str) -> None:
    """Name a case that was left out among the bars."""
    case = f"({', '.join(map(str, shape))}) {str(dtype).split('.')[-1]}"
    limit = 0.9 if dtype == FLOAT32 else 0.8
    note = f"and none of its other bars: {why}"
    run.bars.append(Bar("better backend: bytes/s over copy", case, limit, None, note=note))


def loss_step(run: Run) -> None:
    ceiling = copy_ceiling(run)
    run.results.append({"case": "copy ceiling", "copy_bytes_per_second": ceiling})
    print(f"copy: {ceiling / 1e9:.1f} GB/s, read plus written")
    for shape in GPU_SHAPES if run.cuda else CPU_SHAPES:
        for dtype in (BFLOAT16, FLOAT32):
            if run.out_of_time():
                not_measured(run, shape, dtype, "out of time")
                continue
            with run.alone(f"{shape} {dtype}"):
                try:
                    loss_case(run, shape, dtype, ceiling)
                except torch.OutOfMemoryError as error:
                    not_measured(run, shape, dtype, str(error).splitlines()[0][:200])
            run.write()
            free(run)


def warm_step(run: Run) -> None:
    """Fill torch.compile's cache on disk, several processes at a time."""
    shapes = GPU_SHAPES if run.cuda else CPU_SHAPES
    jobs = [(shape, dtype) for shape in shapes for dtype in ("bfloat16", "float32")]
    if run.options.case is not None:
        shape, dtype = jobs[run.options.case]
        logits, labels = losses.draw(shape, getattr(torch, dtype), run.device)
        for name, loss in peers_of(run).items():
            if name.startswith("compile"):
                losses.value_and_gradient(loss, logits, labels)
                print(f"{shape} {dtype} {name}", flush=True)
        return
    waiting = list(range(len(jobs)))
    running: list[subprocess.Popen[bytes]] = []
    command = [sys.executable, __file__, "warm", "--device", run.options.device, "--json"]
    while waiting or running:
        while waiting and len(running) < 4:
            index = waiting.pop(0)
            more = [os.devnull, "--case", str(index)]
            running.append(subprocess.Popen([*command, *more]))
        running = [process for process in running if process.poll() is None]
        time.sleep(0.2)


# --- small and large -----------------------------------------------------------------------------


def count_kernels(call: Call) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    for _ in range(2):  # what the first session of a process sees is not complete
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and "Sync" not in event.name
        and not event.name.startswith("Activity")  # the profiler's own
        for event in profiler.events()
    )


def capture(call: Call) -> torch.cuda.CUDAGraph:
    """A graph of one call, which must not synchronise with the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def launch_seconds(clock: harness.Clock, device: torch.device) -> float:
    """What one more tiny kernel costs in a graph: its launch."""
    x = torch.zeros(1, device=device)

    def many(count: int) -> Call:
        def call() -> None:
            for _ in range(count):
                x.add_(1)

        return call

    graphs = {count: capture(many(count)) for count in (20, 120)}
    timings = harness.interleave({str(n): g.replay for n, g in graphs.items()}, clock, 25)
    medians = {n: t.summary()["median_ms"] / 1e3 for n, t in timings.items()}
    return (medians["120"] - medians["20"]) / 100


def small_step(run: Run) -> None:
    """A (2, 2, 96^3) step: wall time, launches, and the replay of a graph."""
    shape = (2, 2, 96, 96, 96) if run.cuda else (2, 2, 16, 16, 16)
    case = f"({', '.join(map(str, shape))})"
    ceiling = copy_ceiling(run)
    clock = run.clock()
    launch = launch_seconds(clock, run.device) if run.cuda else 0.0
    for dtype in (FLOAT32, BFLOAT16):
        logits, labels = losses.draw(shape, dtype, run.device)
        truth = Truth(logits, labels)
        leaf = logits.detach().requires_grad_()
        name_of = f"{case} {str(dtype).split('.')[-1]}"
        floor = byte_model.tversky_floor(shape, dtype)
        for name in run.backends:
            with run.alone(f"{name}, {name_of}"):
                small_case(run, name, name_of, leaf, labels, truth, floor, ceiling, launch)
    same_bits(run)


def small_case(
    run: Run,
    name: str,
    case: str,
    leaf: Tensor,
    labels: Tensor,
    truth: Truth,
    floor: int,
    ceiling: float,
    launch: float,
) -> None:
    """Time one backend, count its launches and replay it as a graph."""
    loss, clock = losses.own_loss(name), run.clock()
    check_loss(run, name, loss, truth)
    call = losses.step(loss, leaf, labels)
    for _ in range(20 if run.cuda else 1):
        call()
    walls = harness.Timing([wall_seconds(call, run) for _ in range(200 if run.cuda else 3)])
    wall = walls.summary()["median_ms"] * 1e3
    row: dict[str, Any] = {"case": case, "backend": name, "wall_us": walls.summary()}
    note = ""
    replay = limit = None
    if run.cuda:
        with torch.no_grad():
            row["forward_kernels"] = count_kernels(functools.partial(loss, leaf, labels))
        row["all_kernels"] = count_kernels(call)
        graph = capture(call)
        timing = harness.interleave({"replay": graph.replay}, clock, run.rounds)["replay"]
        replay = timing.summary()["median_ms"] * 1e3
        limit = 1.5 * 1e6 * (floor / ceiling + row["all_kernels"] * launch)
        row |= {"replay_us": replay, "launch_us": launch * 1e6}
        row["replay_limit_us"] = limit
        backward = row["all_kernels"] - row["forward_kernels"]
        for which, count in (("forward", row["forward_kernels"]), ("backward", backward)):
            what = f"{name}: launches of the {which} pass"
            run.bars.append(Bar(what, case, 2, count, at_least=False))
        note = f"replayed as a graph {replay:.1f} us, limit of that {limit:.1f} us"
    bar = Bar(f"{name}: wall time, us (or a graph)", case, 60, wall, False, note)
    if replay is not None and limit is not None and wall > 60 and replay <= limit:
        bar.measured, bar.limit = replay, limit
        bar.note = f"as a graph; wall time {wall:.1f} us"
    run.bars.append(bar)
    run.results.append(row)


def same_bits(run: Run, runs: int = 20) -> None:
    """Loss and gradient of ``runs`` calls, compared bit by bit; a difference is a wrong result."""
    edge = 96 if run.cuda else 12
    for classes in (2, 16, 117):
        for dtype in (FLOAT32, BFLOAT16):
            logits, labels = losses.draw((1, classes, edge, edge, edge), dtype, run.device)
            for name in run.backends:
                loss = losses.own_loss(name)
                first = losses.value_and_gradient(loss, logits, labels)
                equal = 1
                for _ in range(runs - 1):
                    again = losses.value_and_gradient(loss, logits, labels)
                    equal += all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
                case = f"{classes} classes {str(dtype).split('.')[-1]}"
                run.bars.append(Bar(f"{name}: runs with the same bits", case, runs, equal))
                if equal < runs:
                    raise WrongResult(f"{name}, {case}: {runs - equal} of {runs} runs differ")


def large_step(run: Run) -> None:
    """2^31 logits, right, and as fast a voxel as 256^3."""
    edges = (256, 1024) if run.cuda else (16, 32)
    need = 24 << 30
    if run.cuda and torch.cuda.mem_get_info(run.device)[0] < need:
        note = f"the device has less than {need >> 30} GiB free"
        for name in run.backends:
            what = f"{name}: time a voxel, 1024^3 over 256^3"
            run.bars.append(Bar(what, "2 classes bfloat16", 1.1, None, False, note))
        return
    clock = run.clock()
    per_voxel: dict[str, dict[int, float]] = {name: {} for name in run.backends}
    for edge in edges:
        shape = (1, 2, edge, edge, edge)
        logits, labels = losses.draw(shape, BFLOAT16, run.device)
        truth = Truth(logits, labels)
        leaf = logits.detach().requires_grad_()
        for name in run.backends:
            case = f"(1, 2, {edge}^3) bfloat16"
            with run.alone(f"{name}, {case}"):
                check_loss(run, name, losses.own_loss(name), truth)
                functions = {name: losses.step(losses.own_loss(name), leaf, labels)}
                rows = median_ms(harness.interleave(functions, clock, run.rounds, 10.0))
                per_voxel[name][edge] = rows[name]["median_ms"] * 1e6 / edge**3
                found = {"case": case, "backend": name, "ns_per_voxel": per_voxel[name][edge]}
                run.results.append({**found, **rows})
        del logits, labels, truth, leaf
        free(run)
    near, far = edges
    for name, times in per_voxel.items():
        ratio = times[far] / times[near] if len(times) == 2 else None
        note = "" if ratio is not None else "not measured: it failed"
        what = f"{name}: time a voxel, {far}^3 over {near}^3"
        run.bars.append(Bar(what, "2 classes bfloat16", 1.1, ratio, False, note))


# --- fusion --------------------------------------------------------------------------------------


def fusion_case(run: Run, channels: int, edge: int, patch: int, ceiling: float) -> None:
    """Gather form on a grid of half overlap: gate, time, compare with copy."""
    from voxfuse.fusion.grids import plan_grid

    grid = plan_grid((edge,) * 3, (patch,) * 3, 0.5)
    tables = grid.tables("gaussian")
    assert tables.total is None
    # On the device already, so that nothing is copied there inside the clock.
    origins, rows_of = tables.origins.to(run.device), tables.rows.to(run.device)
    weights = [weight.to(run.device) for weight in tables.weights]
    generator = torch.Generator(run.device).manual_seed(0)
    shape = (len(grid), channels, patch, patch, patch)
    patches = torch.empty(shape, device=run.device)
    for one in patches:
        one.normal_(generator=generator)
    volume = [edge] * 3
    functions: dict[str, Call] = {}
    reference = torch.ops.voxfuse_reference
    picked = sorted({0, channels - 1})
    expected = reference.overlap_add(
        patches[:, picked].double(), origins, rows_of, weights, None, volume
    )
    for name, operators in run.backends.items():
        with run.alone(f"{name}: overlap_add of {shape}"):

            def forward(operators: Any = operators) -> Tensor:
                result: Tensor = operators.overlap_add(
                    patches, origins, rows_of, weights, None, volume
                )
                return result

            fused = forward()
            if run.options.inject_wrong_result:
                fused[0, 0, 0, 0] += 1
            error = (fused[picked].double() - expected).abs().max().item()
            if not error <= 1e-5:
                raise WrongResult(f"{name}: overlap_add of {shape} is off by {error:.2e}")

            def backward(operators: Any = operators, fused: Tensor = fused) -> Tensor:
                result: Tensor = operators.overlap_add_backward(
                    fused, origins, rows_of, weights, None
                )
                return result

            functions[name] = forward
            functions[f"{name} backward"] = backward
    del expected
    free(run)
    rows = median_ms(harness.interleave(functions, run.clock(), run.rounds, 10.0))
    case = f"{len(grid)} patches of {channels} x {patch}^3 float32"
    for name in run.backends:
        if name not in rows:
            continue
        model = byte_model.overlap_add(len(grid), channels, (patch,) * 3, volume, FLOAT32, name)
        for suffix, traffic in zip(("", " backward"), model, strict=True):
            speed = traffic.floor / (rows[name + suffix]["median_ms"] / 1e3)
            run.results.append(
                {
                    "case": case,
                    "call": name + suffix,
                    **rows[name + suffix],
                    "floor_bytes": traffic.floor,
                    "moved_over_floor": traffic.ratio,
                    "over_copy": speed / ceiling,
                }
            )
            if not suffix:
                what = f"{name}: overlap_add, bytes/s over copy"
                run.bars.append(Bar(what, case, 0.85, speed / ceiling))


def streaming(run: Run) -> None:
    """Peak memory of streaming labels with 117 classes, above the volume and the predictions."""
    edge, patch, channels = (512, 96, 117) if run.cuda else (24, 8, 5)
    limit = 12.0
    prepared = torch.empty((2, channels, patch, patch, patch), device=run.device).normal_()
    volume = torch.zeros(1, 1, edge, edge, edge, device=run.device)
    turn = [0]

    def predictor(batch: Tensor) -> Tensor:
        turn[0] += 1
        return prepared[turn[0] % 2][None].expand(len(batch), -1, -1, -1, -1)

    def call() -> Tensor:
        result: Tensor = voxfuse.sliding_window_inference(
            volume, (patch,) * 3, 1, predictor, 0.5, output="labels"
        )
        return result

    call()
    seconds = wall_seconds(call, run)
    peak = harness.peak_extra_bytes(call, run.device)
    case = f"{channels} classes, {edge}^3, patches of {patch}^3"
    run.results.append({"case": f"streaming labels, {case}", "s": seconds, "peak_bytes": peak})
    what = "streaming labels: peak memory, GiB"
    run.bars.append(Bar(what, case, limit, peak / 2**30, at_least=False))


def fusion_step(run: Run) -> None:
    ceiling = copy_ceiling(run)
    cases = ((4, 384, 96), (117, 192, 96)) if run.cuda else ((2, 24, 8), (5, 24, 8))
    for channels, edge, patch in cases:
        with run.alone(f"{channels} channels"):
            fusion_case(run, channels, edge, patch, ceiling)
        run.write()
        free(run)
    with run.alone("streaming labels"):
        streaming(run)


# --- the head ------------------------------------------------------------------------------------


def head_step(run: Run) -> None:
    """Dice + cross-entropy of a 1x1x1 convolution: fused against convolution and loss apart."""
    batch, channels, classes, edge = (2, 32, 117, 128) if run.cuda else (1, 8, 5, 12)
    dtype = BFLOAT16 if run.cuda else FLOAT32
    case = f"K={channels} C={classes} ({batch}, {edge}^3) {str(dtype).split('.')[-1]}"
    problem = head_benchmark.Problem(batch, channels, classes, edge, dtype, run.device)
    wanted = {"monai": "eager", "compile": "compiled plain"}
    peers, missing = head_benchmark.peers_of(
        {"plain", *(wanted[peer] for peer in run.options.peers if peer in wanted)}
    )
    run.missing |= missing
    if "compile" not in run.options.peers:
        run.missing["compile"] = "not asked for"
    own = {name: head_benchmark.fused_by(name) for name in run.backends}
    truth = head_benchmark.Truth(problem)
    functions: dict[str, Call] = {}
    for name, loss in {**own, **peers}.items():
        with run.alone(f"head: {name}"):
            errors = truth.errors(problem, loss)
            right = all(error <= head_benchmark.limit(dtype) for error in errors.values())
            if name in own and (not right or run.options.inject_wrong_result):
                listed = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
                raise WrongResult(f"{name}: the head's loss and gradients are off by {listed}")
            run.results.append({"case": case, "call": name, "errors": errors})
            functions[name] = problem.step(loss)
    del truth
    free(run)
    rows = median_ms(harness.interleave(functions, run.clock(), run.rounds, 15.0))
    model = byte_model.head_confusion(batch, channels, classes, (edge,) * 3, dtype)
    run.results.append(
        {"case": case, "rows": rows, "byte_model": [traffic.as_row() for traffic in model]}
    )
    eager = [rows[name]["median_ms"] for name in ("eager", "plain") if name in rows]
    compiled = [rows[name]["median_ms"] for name in ("compiled plain",) if name in rows]
    for name in own.keys() & rows.keys():
        peak = harness.peak_extra_bytes(functions[name], run.device)
        for peer, limit, times in (("eager", 0.5, eager), ("torch.compile", 0.8, compiled)):
            ratio = rows[name]["median_ms"] / min(times) if times else None
            note = "" if times else "not measured: the peer is missing"
            what = f"{name}: head, time over {peer}"
            run.bars.append(Bar(what, case, limit, ratio, at_least=False, note=note))
        what = f"{name}: head, memory above inputs and gradients, MiB"
        extra = (peak - problem.input_gradient_bytes) / 2**20
        run.bars.append(Bar(what, case, 64.0, extra, at_least=False))
    print(json.dumps(rows, indent=1))


STEPS = {
    "loss": loss_step,
    "small": small_step,
    "large": large_step,
    "fusion": fusion_step,
    "head": head_step,
    "warm": warm_step,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=sorted(STEPS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which to end")
    parser.add_argument(
        "--peers",
        type=lambda text: [name for name in text.split(",") if name],
        default=["monai", "nnunet", "compile"],
        help="comma-separated: monai,nnunet,compile",
    )
    parser.add_argument("--case", type=int, help="of warm: only this combination")
    parser.add_argument(
        "--inject-wrong-result",
        action="store_true",
        help="falsify every result, to see that the gates hold",
    )
    run = Run(parser.parse_args())
    try:
        STEPS[run.options.step](run)
    except WrongResult as error:
        print(f"WRONG RESULT: {error}", file=sys.stderr)
        run.write(wrong=str(error))
        return WRONG_RESULT
    except BaseException:  # an interrupt at the time limit above all: what is measured is kept
        run.write()
        raise
    run.write()
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
