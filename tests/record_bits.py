"""Record what a fixed corpus of calls gives, to the last bit, and compare two records.

    python -m tests.record_bits before.json --keep before.pt
    python -m tests.record_bits after.json --compare before.json --keep before.pt

For a change that is to leave every result as it is. The corpus: three operators on the backends
that run here, the public losses, sliding windows, and texts of errors; not the emulated CUDA
kernels. Only public functions and ``torch.ops`` are used, so that it outlives a rebuild of what is
inside. Digests depend on the machine and are not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor

import voxfuse
from voxfuse import functional

Result = tuple[str, Callable[[], Any]]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def normal(seed: int, *shape: int) -> Tensor:
    """Numbers that depend on ``seed`` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(seed: int, classes: int, *shape: int) -> Tensor:
    return torch.randint(0, classes, shape, generator=torch.Generator().manual_seed(seed))


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def confusion(operators: Any) -> Iterator[Result]:
    """Sums and gradient: classes, dtypes, layouts, targets and options."""
    kinds = {
        "": {},
        "channels last": {"layout": channels_last},
        "weighted": {"weighted": True},
        "ignored": {"ignore": 1},
        "focal": {"gamma": 2.0, "full": True},
        "focal background": {"gamma": 0.5, "focal": 1},
        "min": {"overlap": 1},
        "sigmoid": {"activation": 1, "dense": True, "full": True},
        "mixed": {"likelihood": 1, "dense": True},
    }
    for classes, (dtype, kind), (name, o) in itertools.product(
        (1, 2, 4, 20), DTYPES.items(), kinds.items()
    ):

        def call(
            classes: int = classes, kind: torch.dtype = kind, o: Any = o
        ) -> tuple[Tensor, ...]:
            shape = (2, classes, 5, 7, 6)
            input = o.get("layout", lambda x: x)((normal(1, *shape) * 3).to(kind))
            dense = o.get("dense") or classes == 1
            target = labels(2, 2, *shape).bool() if dense else labels(2, classes, 2, 1, 5, 7, 6)
            weight = normal(3, 2, 5, 7, 6).abs().float() if o.get("weighted") else None
            activation = o.get("activation", 2)
            likelihood = o.get("likelihood", activation)
            options = (activation, likelihood, o.get("overlap", 0), o.get("ignore"))
            rest = (o.get("gamma", 0.0),)
            focal = o.get("focal")
            full = o.get("full", False)
            sums = operators.soft_confusion(input, target, weight, *options, *rest, full, focal)
            grad = normal(4, *sums.shape)
            return sums, operators.soft_confusion_backward(
                grad, input, target, weight, *options, *rest, focal
            )

        yield f"soft_confusion {classes} {dtype} {name}", call


def head(operators: Any) -> Iterator[Result]:
    for classes, (dtype, kind) in itertools.product((2, 20), DTYPES.items()):

        def call(classes: int = classes, kind: torch.dtype = kind) -> tuple[Tensor, ...]:
            given = (normal(1, 2, 8, 5, 4, 6), normal(2, classes, 8), normal(3, classes))
            tensors = [x.to(kind) for x in given]
            target, options = labels(4, classes, 2, 5, 4, 6), (2, 2, 0, None, 0.0)
            sums = operators.head_confusion(*tensors, target, None, *options, True, 1 << 20)
            grad = normal(5, *sums.shape)
            return sums, *operators.head_confusion_backward(
                grad, *tensors, target, None, *options, 1 << 20, True, True
            )

        yield f"head_confusion {classes} {dtype}", call


def fusion(operators: Any) -> Iterator[Result]:
    for channels, (dtype, kind), activation in itertools.product(
        (1, 3, 13), DTYPES.items(), (0, 1, 2)
    ):

        def call(
            channels: int = channels, kind: torch.dtype = kind, activation: int = activation
        ) -> tuple[Tensor, ...]:
            origins = torch.tensor([[0, 0, 0], [1, 2, 3], [2, 0, 5]])
            rows = torch.zeros_like(origins)
            weights = [normal(6, 1, n).abs() for n in (3, 4, 9)]
            patches = normal(7, 3, channels, 3, 4, 9).to(kind)
            tables, volume = (origins, rows, weights, None), [5, 6, 14]
            fused = operators.overlap_add(patches, *tables, volume, activation)
            grad = normal(8, channels, *volume).to(kind)
            gradient = operators.overlap_add_backward(grad, *tables, patches, activation)
            ring = torch.zeros(
                channels, *volume, dtype=torch.float64 if kind == torch.float64 else torch.float32
            )
            operators.overlap_add_(ring, patches, *tables, 0, 0, 5, 2, 0.0, activation)
            return fused, gradient, ring

        yield f"overlap_add {channels} {dtype} {activation}", call


def losses() -> Iterator[Result]:
    """Every public loss function with its defaults, on labels."""
    for name, loss in sorted(vars(functional).items()):
        if not name.endswith("_loss") or not inspect.isfunction(loss):
            continue
        for dtype, kind in DTYPES.items():

            def call(loss: Any = loss, kind: torch.dtype = kind) -> tuple[Tensor, ...]:
                input = (normal(1, 2, 3, 6, 5, 7) * 3).to(kind).requires_grad_()
                value = loss(input, labels(2, 3, 2, 1, 6, 5, 7))
                value.sum().backward()
                assert input.grad is not None
                return value.detach(), input.grad

            yield f"{name} {dtype}", call


def windows() -> Iterator[Result]:
    """A sliding window over a fixed network, in every output."""
    for output, overlap in itertools.product(("logits", "probabilities", "labels"), (0.25, 0.5)):

        def call(output: str = output, overlap: float = overlap) -> Any:
            kernel = normal(9, 3, 1, 3, 3, 3).float()
            return voxfuse.sliding_window_inference(
                normal(10, 1, 1, 20, 18, 16).float(),
                (8, 8, 8),
                2,
                lambda x: torch.nn.functional.conv3d(x, kernel, padding=1),
                overlap=overlap,
                output=output,
                activation="none" if output == "logits" else "softmax",
            )

        yield f"sliding_window_inference {output} {overlap}", call


def mistakes() -> Iterator[Result]:
    """Calls that are refused: the text is the result."""
    x, y = normal(1, 1, 3, 4, 4, 4), labels(2, 3, 1, 1, 4, 4, 4)
    tversky = functional.tversky_loss
    yield "error: target's shape", lambda: tversky(x, y[..., :2])
    yield "error: target's batch", lambda: tversky(x, y.expand(2, -1, -1, -1, -1))
    yield "error: input's dtype", lambda: tversky(x.long(), y)
    yield "error: alpha", lambda: tversky(x, y, alpha=-1.0)
    yield "error: reduction", lambda: tversky(x, y, reduction="most")
    yield "error: a label that is no class", lambda: tversky(x, y + 3)
    yield "error: roi_size", lambda: voxfuse.sliding_window_inference(x, (4, 4), 1, lambda z: z)
    yield (
        "error: overlap",
        lambda: voxfuse.sliding_window_inference(x, (2, 2, 2), 1, lambda z: z, overlap=1.5),
    )


def corpus(only: set[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What to call, by section; a section is a backend, or losses, windows or errors."""
    backends = {
        "cpp": torch.ops.voxfuse,
        "reference": torch.ops.voxfuse_reference,
        "triton": torch.ops.voxfuse_triton,
    }
    sections: dict[str, Callable[[], Iterator[Result]]] = {
        name: lambda x=operators: itertools.chain(confusion(x), head(x), fusion(x))
        for name, operators in backends.items()
    }
    sections |= {"losses": losses, "windows": windows, "errors": mistakes}
    unknown = only - sections.keys()
    if unknown:
        raise SystemExit(f"--only: got {sorted(unknown)}, expected some of {', '.join(sections)}")
    for section in sections:
        if not only or section in only:
            for name, call in sections[section]():
                yield f"{section}: {name}", call


def outcome(call: Callable[[], Any]) -> tuple[str, list[Tensor]]:
    """A digest of the bytes, dtypes and shapes of what ``call`` returns, or the error's text."""
    try:
        found = call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", []
    tensors = [found] if isinstance(found, Tensor) else list(found)
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest(), [x.detach().clone() for x in tensors]


def difference(before: list[Tensor], after: list[Tensor]) -> str:
    """The largest distance, over the largest number."""
    if [x.shape for x in before] != [x.shape for x in after]:
        return "other shapes"
    found = []
    for old, new in zip(before, after, strict=True):
        a, b = old.double().nan_to_num(), new.double().nan_to_num()
        size = float(a.abs().max()) if a.numel() else 0.0
        far = float((a - b).abs().max()) if a.numel() else 0.0
        found.append(f"{far:.2e} of {size:.2e}")
    return ", ".join(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("out", type=Path, help="JSON to write: digest or error by name")
    parser.add_argument("--only", default="", help="sections, by commas")
    parser.add_argument("--compare", type=Path, help="a JSON from before: list what differs")
    parser.add_argument(
        "--keep", type=Path, help="values: written, or with --compare read for the differences"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = torch.load(options.keep) if options.compare and options.keep else {}
    before = json.loads(options.compare.read_text()) if options.compare else {}
    found, values, changed = {}, {}, 0
    for name, call in corpus({x for x in options.only.split(",") if x}):
        found[name], values[name] = outcome(call)
        if options.compare and before.get(name) != found[name]:
            changed += 1
            size = difference(kept[name], values[name]) if name in kept else ""
            print(f"{name}: {before.get(name, 'new')[:200]} -> {found[name][:200]} {size}")
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.keep and not options.compare:
        torch.save(values, options.keep)
    print(f"{len(found)} recorded" + (f", {changed} differ" if options.compare else ""))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
