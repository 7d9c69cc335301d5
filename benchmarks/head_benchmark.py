"""The last layer and its loss as one: time and memory against convolution and loss apart.

Everybody computes Dice + cross-entropy of the logits of a 1x1x1 convolution over K features, and
the gradients of features, weight and bias. Half precision runs under autocast, as in training.

* ``fused``: :func:`voxfuse.head_loss`, which makes no logits
* ``unfused``: convolution, then :class:`voxfuse.DiceCELoss`
* ``eager``: convolution, then MONAI's DiceCELoss
* ``compiled plain``: ``torch.compile`` of the convolution and a Dice + cross-entropy written for
  it, which compares labels in place of one-hot encoding them
* ``compiled`` (on request): ``torch.compile`` of ``eager``, slower than that so far
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import voxfuse
from benchmarks import harness
from benchmarks.losses import blocky_labels

#: Classes of the timings, and of memory over the classes.
CLASSES, MEMORY_CLASSES = (2, 14, 117), (2, 8, 14, 32, 64, 117, 256)
SWEEP_FEATURES, SWEEP_CLASSES = (16, 32, 64, 256), (2, 8, 32, 117)
VOLUMES = (64, 96, 128)

Loss = Callable[[nn.Conv3d, Tensor, Tensor], Tensor]


class Problem:
    """Features, a head and labels."""

    def __init__(
        self,
        batch: int,
        channels: int,
        classes: int,
        edge: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, dtype
        self.labels = blocky_labels(batch, classes, (edge,) * 3, generator)
        features = torch.empty((batch, channels, edge, edge, edge), dtype=dtype, device=device)
        self.features = features.normal_(generator=generator).requires_grad_()
        self.head = nn.Conv3d(channels, classes, 1, device=device)
        with torch.no_grad():
            self.head.weight.normal_(std=1.5 / channels**0.5, generator=generator)
        self.input_gradient_bytes = features.numel() * dtype.itemsize
        self.value = torch.tensor(float("nan"))  # of the last step
        self.logit_bytes = features.numel() // channels * classes * dtype.itemsize

    def step(self, loss: Loss) -> Callable[[], Tensor]:
        """Forward and backward; everybody allocates the gradients."""
        leaves = (self.features, *self.head.parameters())
        half = self.dtype not in (torch.float32, torch.float64)

        def call() -> Tensor:
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast(self.device.type, self.dtype, enabled=half):
                value = loss(self.head, self.features, self.labels)
            value.backward()
            self.value = value.detach()
            gradient, self.features.grad = self.features.grad, None
            assert gradient is not None
            return gradient

        return call


def fused_by(backend: str) -> Loss:
    own = voxfuse.DiceCELoss(backend=backend)
    return lambda head, features, labels: voxfuse.head_loss(
        own, features, head.weight, head.bias, labels
    )


fused = fused_by("auto")


def unfused(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
    value: Tensor = _OWN(head(features), labels)
    return value


def plain(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
    """Dice + cross-entropy without a one-hot volume, which compiles well."""
    logits = head(features).float()
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    index = torch.arange(logits.shape[1], device=logits.device, dtype=labels.dtype)
    hit = labels == index.reshape(1, -1, 1, 1, 1)
    axes = (2, 3, 4)
    overlap = torch.where(hit, p, 0).sum(axes)
    dice = 1 - (2 * overlap + 1e-5) / (p.sum(axes) + hit.to(p.dtype).sum(axes) + 1e-5)
    return dice.mean() - torch.where(hit, log_p, 0).sum() / labels.numel()


_OWN = voxfuse.DiceCELoss()


def peers_of(wanted: set[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """The peers wanted, and why one is missing."""
    found: dict[str, Loss] = {}
    missing = {}
    if importlib.util.find_spec("monai") is None:
        missing["monai"] = "the package monai is not installed"
    else:
        from monai.losses import DiceCELoss

        monai = DiceCELoss(softmax=True, to_onehot_y=True)

        def eager(head: nn.Conv3d, features: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = monai(head(features), labels)
            return value

        if "eager" in wanted:
            found["eager"] = eager
        if "compiled" in wanted:
            found["compiled"] = torch.compile(eager, dynamic=False)
    if "plain" in wanted:
        found["plain"] = plain
    if "compiled plain" in wanted:
        found["compiled plain"] = torch.compile(plain, dynamic=False)
    return found, missing


class Truth:
    """Value and gradients of the package's reference in float64, chunk by chunk."""

    def __init__(self, problem: Problem) -> None:
        # Under autocast everybody rounds the head's weight, too.
        exact = [x.detach().to(problem.dtype).double() for x in problem.head.parameters()]
        leaves = [x.requires_grad_() for x in (problem.features.detach().double(), *exact)]
        loss = voxfuse.DiceCELoss(backend="reference")
        value = voxfuse.head_loss(loss, *leaves, problem.labels)  # type: ignore[arg-type]
        self.value = value.item()
        self.gradients = torch.autograd.grad(value, leaves)

    def errors(self, problem: Problem, loss: Loss) -> dict[str, float]:
        """Relative errors of the loss and, over the largest one, of each gradient."""
        gradient = problem.step(loss)()
        found = (gradient, *(p.grad for p in problem.head.parameters()))
        errors = {"loss": abs(problem.value.item() - self.value) / abs(self.value)}
        for what, mine, true in zip(
            ("features", "weight", "bias"), found, self.gradients, strict=True
        ):
            assert mine is not None
            errors[what] = float((mine.double() - true).abs().max() / true.abs().max())
        return errors


def limit(dtype: torch.dtype) -> float:
    """PyTorch rounds half-precision logits, which makes exponentials off by a few per cent."""
    return 2e-3 if dtype == torch.float32 else 5e-2


def gate(problem: Problem, losses: dict[str, Loss]) -> None:
    """Refuse to time a loss whose value or gradients are wrong."""
    truth = Truth(problem)
    for name, loss in losses.items():
        errors = truth.errors(problem, loss)
        if not all(error <= limit(problem.dtype) for error in errors.values()):
            listed = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            raise SystemExit(f"{name}: value or gradients are off by {listed}")


def measure_times(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Interleaved forward + backward of everybody, at K features and every number of classes."""
    device = torch.device(options.device)
    clock = harness.Clock(device)
    rows = []
    for classes in options.classes or CLASSES:
        torch._dynamo.reset()
        problem = Problem(options.batch, options.features, classes, options.edge, dtype, device)
        peers, missing = peers_of(set(options.peers))
        losses = {"fused": fused, "unfused": unfused, **peers}
        for name, why in missing.items():
            print(f"  {name} left out: {why}")
        gate(problem, losses)
        harness.allocate_fresh()
        calls = {name: problem.step(loss) for name, loss in losses.items()}
        timings = harness.interleave(calls, clock, options.rounds, options.budget)
        row: dict[str, Any] = {
            "batch": options.batch,
            "features": options.features,
            "classes": classes,
            "edge": options.edge,
            "losses": {name: timing.summary() for name, timing in timings.items()},
        }
        own = row["losses"]["fused"]["min_ms"]
        print(
            f"\nK={options.features}, C={classes}, ({options.batch}, {options.edge}^3): "
            "forward + backward"
        )
        for name, summary in row["losses"].items():
            summary["fused_over_it"] = own / summary["min_ms"]
            print(
                f"  {name:<16}{summary['min_ms']:>10.1f} ms (p20-p80 {summary['p20_ms']:.1f}-"
                f"{summary['p80_ms']:.1f})   fused takes {summary['fused_over_it']:.2f} of it"
            )
        rows.append(row)
        del problem, calls
        gc.collect()
    return rows


def available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def weigh(problem: Problem, losses: dict[str, Loss], row: dict[str, Any]) -> dict[str, Any]:
    """Add to ``row`` everybody's peak beyond the inputs and their gradients.

    Whoever would need more than a quarter of the free memory is left out; the guess, eight volumes
    of logits for MONAI's loss and four for ours, is more than either takes.
    """
    row |= {"gradient_bytes": problem.input_gradient_bytes, "logit_bytes": problem.logit_bytes}
    row["extra_bytes"] = {}
    for name, loss in losses.items():
        if name != "fused":
            volumes = 4 if name == "unfused" else 8
            if volumes * problem.logit_bytes > available_bytes(problem.device) / 4:
                row["extra_bytes"][name] = None
                continue
        peak = harness.peak_extra_bytes(problem.step(loss), problem.device)
        row["extra_bytes"][name] = max(0, peak - problem.input_gradient_bytes)
    cells = ", ".join(
        f"{name} " + ("too large for this machine" if extra is None else f"{extra / 2**20:.1f} MiB")
        for name, extra in row["extra_bytes"].items()
    )
    print(
        f"  C={row['classes']:<4} ({row['batch']}, {row['edge']}^3), logits "
        f"{problem.logit_bytes / 2**20:.0f} MiB: {cells}"
    )
    return row


def measure_memory(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Peak memory over the volume with the most classes, and over the classes."""
    device = torch.device(options.device)
    features = options.features
    most = max(options.classes or CLASSES)
    losses = {"fused": fused, "unfused": unfused, **peers_of({"eager"} & set(options.peers))[0]}
    print(f"\npeak memory beyond inputs and their gradients, K={features}")
    volumes, classes = [], []
    for edge in options.volumes or ((32, 48) if options.quick else VOLUMES):
        problem = Problem(2, features, most, edge, dtype, device)
        row = {"batch": 2, "features": features, "classes": most, "edge": edge}
        volumes.append(weigh(problem, losses, row))
        del problem
        gc.collect()
    edge = min(options.edge, 64)
    for count in MEMORY_CLASSES:
        problem = Problem(1, features, count, edge, dtype, device)
        row = {"batch": 1, "features": features, "classes": count, "edge": edge}
        classes.append(weigh(problem, losses, row))
        del problem
        gc.collect()
    return {"volumes": volumes, "classes": classes}


def measure_sweep(options: argparse.Namespace, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Fused against unfused over features and classes: where fusing begins to pay."""
    device = torch.device(options.device)
    clock = harness.Clock(device)
    edge = 32 if options.quick else 64
    rows = []
    print(f"\nfused over unfused, (1, {edge}^3)")
    for features in SWEEP_FEATURES:
        for classes in SWEEP_CLASSES:
            problem = Problem(1, features, classes, edge, dtype, device)
            calls = {"fused": problem.step(fused), "unfused": problem.step(unfused)}
            timings = harness.interleave(calls, clock, options.rounds, 1.0)
            summary = {name: timing.summary() for name, timing in timings.items()}
            ratio = summary["fused"]["min_ms"] / summary["unfused"]["min_ms"]
            rows.append(
                {
                    "features": features,
                    "classes": classes,
                    "edge": edge,
                    "losses": summary,
                    "fused_over_unfused": ratio,
                }
            )
        line = "".join(
            f"  C={row['classes']}: {row['fused_over_unfused']:.2f}"
            for row in rows
            if row["features"] == features
        )
        print(f"  K={features:<3}{line}")
    return rows


def run(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Run the parts asked for and return what --json writes."""
    device = torch.device(options.device)
    if options.quick:
        options.edge, options.rounds = min(options.edge, 32), min(options.rounds, 3)
    results: dict[str, Any] = {
        "benchmark": "head",
        "machine": harness.machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    print(f"machine: {results['machine']}")
    # Memory first: what torch.compile leaves behind does not belong to anybody.
    if "memory" in options.parts:
        results["memory"] = measure_memory(options, dtype)
    if "sweep" in options.parts:
        results["sweep"] = measure_sweep(options, dtype)
    if "time" in options.parts:
        results["time"] = measure_times(options, dtype)
    return results
