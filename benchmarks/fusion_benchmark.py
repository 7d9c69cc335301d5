"""Patch fusion: time and memory of putting a volume together from overlapping patches.

The predictor is a null one: it hands out prepared predictions, 32 distinct ones in turn, together
more than the last-level cache holds. What is left is cutting patches out, adding them, and making
of the sums what was asked for. Every job starts at the same patches and ends at the same result:
the weighted means of all classes ("logits"), or uint8 or int64 labels.

Floor: "read" is reading the predictions of all patches once.

Peers: MONAI's sliding window, plain and with buffer_steps, TorchIO's GridAggregator, and KonfAI's
accumulators, for labels that of finished slabs. MONAI multiplies a prediction in place, so it is
given a copy; the seconds of copying are measured inside the call and taken off. Where labels are
asked for, the peers' volumes and slabs go through argmax.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import voxfuse
from benchmarks import fusion_memory, harness
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.windows import gaussian_window

DISTINCT = 32
OVERLAP = 0.5
#: Peers whose volumes would take more than this are left out of the sweeps of memory.
PEER_LIMIT = 6 << 30
PEERS = {"monai": "monai", "monai-buffered": "monai", "torchio": "torchio", "konfai": "konfai"}
FLOOR = ("read", "copy")

Call = Callable[[], Any]


class NullPredictor:
    """Hands out prepared predictions, the next ones at every call.

    ``fresh`` predictors return new tensors, as a network does: for measuring memory.
    """

    def __init__(
        self,
        channels: int,
        patch: Sequence[int],
        distinct: int = DISTINCT,
        device: torch.device | None = None,
        fresh: bool = False,
    ) -> None:
        self.fresh = fresh
        generator = torch.Generator().manual_seed(0)
        self.prepared = torch.randn((distinct, channels, *patch), generator=generator).to(device)
        self.restart()

    def restart(self) -> None:
        self.next = 0
        self.copy_seconds = 0.0

    def __call__(self, batch: Tensor) -> Tensor:
        prediction = self._prepared(batch.shape[0])
        return prediction.clone() if self.fresh else prediction

    def copied(self, batch: Tensor) -> Tensor:
        """A prediction that the caller may overwrite; the seconds that copying takes are kept."""
        _wait(self.prepared.device)
        started = time.perf_counter()
        with record_function("copying"):
            prediction = self._prepared(batch.shape[0]).clone()
        _wait(self.prepared.device)
        self.copy_seconds += time.perf_counter() - started
        return prediction

    def _prepared(self, size: int) -> Tensor:
        first, distinct = self.next % self.prepared.shape[0], self.prepared.shape[0]
        self.next += size
        if first + size <= distinct:
            return self.prepared[first : first + size]
        # A batch that runs over the end: no job that is timed takes such a batch.
        return self.prepared[[(first + i) % distinct for i in range(size)]]


class Setting:
    """A volume, its patches and their predictions."""

    def __init__(
        self,
        shape: Sequence[int],
        patch: int,
        classes: int,
        device: torch.device,
        distinct: int = DISTINCT,
    ) -> None:
        self.device = device
        self.classes = classes
        self.patch = (patch,) * 3
        self.volume = torch.zeros(1, 1, *shape, device=device)
        grid = plan_grid(shape, self.patch, OVERLAP)
        self.origins = grid.origins.tolist()
        self.count, self.row = len(grid), len(grid.starts[-1])
        # Whole rows, so that a batch of one row is a slice of what is prepared.
        self.predictor = NullPredictor(
            classes, self.patch, -(-distinct // self.row) * self.row, device
        )

    def monai(self, **options: Any) -> Tensor:
        from monai.inferers import sliding_window_inference

        self.predictor.restart()
        # With a buffer MONAI multiplies into a new tensor.
        predict = self.predictor if "buffer_steps" in options else self.predictor.copied
        return sliding_window_inference(
            self.volume, self.patch, 1, predict, OVERLAP, mode="gaussian", **options
        )

    def drop_in(self) -> Tensor:
        from voxfuse.integrations.monai import sliding_window_inference

        self.predictor.restart()
        return sliding_window_inference(
            self.volume, self.patch, 1, self.predictor, OVERLAP, mode="gaussian"
        )

    def voxfuse(self, batch: int = 1, window: str = "gaussian", **options: Any) -> Tensor:
        self.predictor.restart()
        # The order of MONAI's patches, so that every job adds the same predictions.
        return voxfuse.sliding_window_inference(
            self.volume, self.patch, batch, self.predictor, OVERLAP, window=window, stream_axis=0,
            **options,
        )  # fmt: skip

    def aggregator(
        self, make: Callable[..., Any], mode: str, staged: bool = False, **options: Any
    ) -> Tensor:
        """What TorchIO's aggregator, or one with its interface, makes of the patches.

        ``staged`` marks the calls for the split by stage, where operators alone do not tell.
        """

        def stage(name: str) -> Any:
            return record_function(name) if staged else contextlib.nullcontext()

        sampler = self._sampler()
        locations = torch.as_tensor(sampler.locations)
        self.predictor.restart()
        aggregator = make(sampler, mode, **options)
        for i in range(len(locations)):
            with stage("fusion"):
                aggregator.add_batch(self.predictor(self.volume), locations[i : i + 1])
        with stage("finalisation"):
            return aggregator.get_output_tensor()

    def konfai(self, output: str) -> Tensor:
        """What KonfAI's accumulators make of the patches; labels from finished slabs."""
        from konfai.data.patching import Accumulator, Gaussian, StreamingAccumulator

        places = [
            tuple(slice(x, x + n) for x, n in zip(origin, self.patch, strict=True))
            for origin in self.origins
        ]
        combine = Gaussian()
        combine.set_patch_config(list(self.patch), int(self.patch[0] * OVERLAP))
        self.predictor.restart()
        if output == "logits":
            accumulator = Accumulator(places, list(self.patch), combine)
            for i in range(self.count):
                accumulator.add_layer(i, self.predictor(self.volume))
            return accumulator.assemble()
        labels = torch.empty(self.volume.shape, dtype=torch.int64, device=self.device)
        streaming = StreamingAccumulator(places, list(self.patch), combine)
        for i in range(self.count + 1):
            if i < self.count:
                slabs = streaming.add_layer(i, self.predictor(self.volume))
            else:
                slabs = streaming.finalize()
            for rows, slab in slabs:
                labels[:, :, rows] = slab.argmax(1, keepdim=True)
        return labels

    def _sampler(self) -> Any:
        import torchio

        # The image's values play no part; one voxel, expanded, needs no memory.
        image = torchio.ScalarImage(tensor=torch.zeros(1, 1, 1, 1).expand(self.volume.shape[1:]))
        overlap = [int(size * OVERLAP) for size in self.patch]
        return torchio.GridSampler(torchio.Subject(image=image), self.patch, overlap)


def jobs(
    setting: Setting, output: str, peers: Sequence[str], modes: Sequence[str]
) -> dict[str, Call]:
    """The calls that lead to ``output``, the floor among them; TorchIO's in every overlap mode."""
    predictor, probe = setting.predictor, setting.volume[:1]

    def copy() -> None:
        predictor.restart()
        for _ in range(setting.count):
            predictor(probe).clone()

    def read() -> None:
        predictor.restart()
        for _ in range(setting.count):
            predictor(probe).sum()

    calls: dict[str, Call] = {"read": read, "copy": copy}
    labels = output == "labels"

    def finish(call: Call, axis: int = 1) -> Call:
        """A peer's volume, or its labels."""

        def labelled() -> Tensor:
            volume = call()
            with record_function("finalisation"):
                return volume.argmax(axis, keepdim=True)

        return labelled if labels else call

    if "monai" in peers:
        calls["MONAI"] = finish(setting.monai)
    if "monai-buffered" in peers:
        calls["MONAI, buffered"] = finish(lambda: setting.monai(buffer_steps=1, buffer_dim=0))
    if "konfai" in peers:
        calls["KonfAI"] = lambda: setting.konfai(output)
    if not labels:
        calls["voxfuse as MONAI"] = setting.drop_in
    calls["voxfuse"] = lambda: setting.voxfuse(output=output)
    calls["voxfuse, one row per batch"] = lambda: setting.voxfuse(setting.row, output=output)
    if "torchio" in peers:
        from torchio import GridAggregator as Peer

        from voxfuse.integrations.torchio import GridAggregator as Own

        for mode in modes:
            calls[f"TorchIO, {mode}"] = finish(
                lambda mode=mode: setting.aggregator(Peer, mode, staged=True), axis=0
            )
            if labels and mode == "crop":
                continue
            options = {"output": "labels"} if labels else {}
            calls[f"voxfuse as TorchIO, {mode}"] = lambda mode=mode, options=options: (
                setting.aggregator(Own, mode, **options)
            )
    return calls


def check(setting: Setting, calls: dict[str, Call], output: str) -> dict[str, float]:
    """Raise unless every result of ours is the peer's; return how far each is from it."""

    def compare(name: str, actual: Tensor, expected: Tensor, axis: int = 1) -> None:
        actual, expected = actual.to(setting.device), expected.to(setting.device)
        if output == "labels" and expected.shape != actual.shape:
            expected = expected.argmax(axis, keepdim=True)
        if output == "labels":
            worst[name] = float((actual != expected).double().mean())
        else:
            worst[name] = float((actual - expected).abs().max())
        # Normal numbers, up to 5 of magnitude: float32 sums of 8 of them, in another order, are
        # 1e-5 apart. Labels differ where the two greatest sums are that close.
        if not worst[name] <= 1e-4:
            raise RuntimeError(f"{name}: is not the peer's result: {worst[name]:g} apart")

    worst: dict[str, float] = {}
    if "MONAI" in calls:
        # MONAI raises the least weights of its Gaussian; ours are MONAI's in the drop-in alone.
        window = gaussian_window(list(setting.patch)).float().to(setting.device)
        plain = setting.monai(roi_weight_map=window)
        for name in ("voxfuse", "voxfuse, one row per batch"):
            compare(name, calls[name](), plain)
        del plain
        if "voxfuse as MONAI" in calls:
            compare("voxfuse as MONAI", calls["voxfuse as MONAI"](), calls["MONAI"]())
    if "KonfAI" in calls:
        compare("KonfAI", calls["KonfAI"](), calls["voxfuse"]())
    for name, call in calls.items():
        mode = name.removeprefix("voxfuse as TorchIO, ")
        if mode != name:
            compare(name, call(), calls[f"TorchIO, {mode}"](), 0)
    return worst


def _time(options: argparse.Namespace, peers: Sequence[str], output: str) -> dict[str, Any]:
    device = torch.device(options.device)
    edge, patch = (96, 48) if options.quick else (options.volume, options.patch)
    setting = Setting((edge,) * 3, patch, options.classes[0], device)
    modes = ("crop", "average", "hann") if output == "logits" else ("hann",)
    calls = jobs(setting, output, peers, modes)
    worst = check(setting, calls, output)

    copies: dict[str, list[float]] = {name: [] for name in calls}

    def noted(name: str, call: Call) -> Call:
        def run() -> Any:
            result = call()
            copies[name].append(setting.predictor.copy_seconds)
            return result

        return run

    rounds = min(options.rounds, 3) if options.quick else options.rounds
    timings = harness.interleave(
        {name: noted(name, call) for name, call in calls.items()},
        harness.Clock(device),
        rounds,
        options.budget,
    )
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        # The first of the copies belongs to the call that warms up.
        spent = zip(timing.seconds, copies[name][1:], strict=True)
        rows[name] = harness.Timing([total - copying for total, copying in spent]).summary()
        rows[name]["copies_ms"] = 1e3 * statistics.median(copies[name][1:])
    print(
        f"\n{output}: {setting.classes} classes, {edge}^3, {setting.count} patches of {patch}^3, "
        f"overlap {OVERLAP}; median of {rows['read']['rounds']} rounds"
    )
    for name, row in rows.items():
        row["over_read"] = row["median_ms"] / rows["read"]["median_ms"]
        line = f"  {name:28}{row['median_ms']:9.1f} ms  {row['over_read']:6.2f} x reading"
        if name.startswith("voxfuse"):
            mode = name.removeprefix("voxfuse as TorchIO, ")
            rivals: tuple[str, ...] = (f"TorchIO, {mode}",)
            if mode == name:
                rivals = ("MONAI", "MONAI, buffered", "KonfAI")
            row["times_faster_than"] = {
                rival: rows[rival]["median_ms"] / row["median_ms"]
                for rival in rivals
                if rival in rows
            }
            for rival, ratio in row["times_faster_than"].items():
                line += f"   {ratio:.2f} x as fast as {rival}"
        print(line)
    return {
        "output": output,
        "classes": setting.classes,
        "volume": edge,
        "patch": patch,
        "overlap": OVERLAP,
        "patches": setting.count,
        "rows": rows,
        "differences": worst,
    }


# --- probabilities of every patch -----------------------------------------------------------------

#: Classes, of as many voxels a patch; with more, smaller volumes.
SOFT = ((4, 256, 96), (21, 192, 96), (117, 128, 64))


def _soft(options: argparse.Namespace, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Softmax of every patch, then the mean: inside the addition, by torch.softmax before it, and
    by the predictor that MONAI is given. Labels out, and the highest memory on the way."""
    device = torch.device(options.device)
    results = []
    for classes, edge, patch in ((4, 64, 32), (21, 64, 32)) if options.quick else SOFT:
        for dtype in (torch.float32, torch.bfloat16):
            setting = Setting((edge,) * 3, patch, classes, device, 8)
            setting.predictor.prepared = setting.predictor.prepared.to(dtype)
            results.append(_soft_rows(options, peers, setting))
    return results


def _soft_rows(
    options: argparse.Namespace, peers: Sequence[str], setting: Setting
) -> dict[str, Any]:
    predictor = setting.predictor

    def read() -> None:
        predictor.restart()
        for _ in range(setting.count):
            predictor(setting.volume[:1]).sum()

    def before(batch: Tensor) -> Tensor:
        return torch.softmax(predictor(batch), 1, dtype=torch.float32)

    def fused(predict: Call, **wish: Any) -> Tensor:
        predictor.restart()
        return voxfuse.sliding_window_inference(
            setting.volume, setting.patch, 1, predict, OVERLAP, window="gaussian", stream_axis=0,
            output="labels", **wish,
        )  # fmt: skip

    calls: dict[str, Call] = {
        "read": read,
        "voxfuse": lambda: fused(predictor, activation="softmax", voting="soft"),
        "torch.softmax, overlap_add_": lambda: fused(before),
    }
    if "monai" in peers:
        from monai.inferers import sliding_window_inference

        def monai(**wish: Any) -> Tensor:
            predictor.restart()
            return sliding_window_inference(
                setting.volume, setting.patch, 1, before, OVERLAP, mode="gaussian", **wish
            ).argmax(1, keepdim=True)

        calls["MONAI"] = monai
    expected = calls["torch.softmax, overlap_add_"]()
    differ = {"voxfuse": float((calls["voxfuse"]() != expected).double().mean())}
    if "MONAI" in calls:
        window = gaussian_window(list(setting.patch)).float().to(setting.device)
        differ["MONAI"] = float((monai(roi_weight_map=window) != expected).double().mean())
    # Labels differ where the two greatest means are a rounding apart.
    if not max(differ.values()) <= 1e-3:
        raise RuntimeError(f"soft voting: labels differ: {differ}")
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    timings = harness.interleave(calls, harness.Clock(setting.device), rounds, options.budget)
    rows = {name: timing.summary() for name, timing in timings.items()}
    for name, call in calls.items():
        if name != "read":
            rows[name]["peak_bytes"] = harness.peak_extra_bytes(call, setting.device, warm=0)
    edge, dtype = setting.volume.shape[-1], str(predictor.prepared.dtype).removeprefix("torch.")
    print(
        f"\nsoft voting to labels: {setting.classes} classes, {edge}^3, {setting.count} patches of "
        f"{setting.patch[0]}^3, {dtype}; median of {rows['read']['rounds']} rounds"
    )
    for name, row in rows.items():
        row["over_ours"] = row["median_ms"] / rows["voxfuse"]["median_ms"]
        peak = f"{row['peak_bytes'] / 2**20:8.0f} MiB" if "peak_bytes" in row else ""
        print(f"  {name:28}{row['median_ms']:9.1f} ms  {row['over_ours']:6.2f} x ours {peak}")
    return {
        "classes": setting.classes,
        "volume": edge,
        "patch": setting.patch[0],
        "patches": setting.count,
        "dtype": dtype,
        "rows": rows,
        "differences": differ,
    }


# --- where the time goes --------------------------------------------------------------------------

#: Operators by what they do for a sliding window. "copying" is that of MONAI's predictions, which
#: a network's own would not need.
STAGES = {
    "copying": "copying",
    "cutting": "cutting",
    "aten::cat": "cutting",
    "aten::contiguous": "cutting",
    "fusion": "fusion",
    "aten::mul": "fusion",
    "aten::mul_": "fusion",
    "aten::add_": "fusion",
    "voxfuse::overlap_add_": "fusion",
    "finalisation": "finalisation",
    "aten::div_": "finalisation",
    "aten::argmax": "finalisation",
    "voxfuse::finalize_slab": "finalisation",
    "aten::zeros": "allocation",
    "aten::zero_": "allocation",
    "aten::empty": "allocation",
}
SPLIT = ("cutting", "fusion", "finalisation", "allocation", "rest")


def stages(call: Call, device: torch.device) -> dict[str, float]:
    """Milliseconds of one call by stage; "rest" is what no operator took."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    call()
    with profile(activities=activities) as profiler:
        started = time.perf_counter()
        call()
        _wait(device)
        total = 1e3 * (time.perf_counter() - started)
    spent: Counter[str] = Counter()
    for event in profiler.events():
        if event.cpu_parent is None and event.device_type == torch.autograd.DeviceType.CPU:
            busy = event.device_time_total if device.type == "cuda" else event.cpu_time_total
            spent[STAGES.get(event.name, "rest")] += busy / 1e3
    spent["rest"] = max(total - sum(spent.values()) + spent["rest"], 0.0)
    return {stage: spent[stage] for stage in SPLIT}


def network_ms(patch: Sequence[int], classes: int, device: torch.device) -> float | None:
    """Milliseconds that a small network takes for one patch; None without MONAI."""
    if importlib.util.find_spec("monai") is None:
        return None
    from monai.networks.nets import UNet

    net = UNet(3, 1, classes, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=1)
    net = net.to(device).eval()
    image = torch.randn(1, 1, *patch, device=device)
    clock = harness.Clock(device)
    with torch.no_grad():
        net(image)
        return 1e3 * statistics.median(clock.time(lambda: net(image)) for _ in range(3))


def _split(options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    """Volume to labels, by stage, beside the time of a small network for as many patches."""
    device = torch.device(options.device)
    edge, patch = (96, 48) if options.quick else (options.volume, options.patch)
    setting = Setting((edge,) * 3, patch, options.classes[0], device)
    given = setting.predictor

    class Touching(NullPredictor):
        """Reads its batch as a network would, which is when a patch is really cut out."""

        def __init__(self) -> None:
            self.prepared, self.fresh = given.prepared, False
            self.restart()

        def __call__(self, batch: Tensor) -> Tensor:
            with record_function("cutting"):
                batch.contiguous()
            return super().__call__(batch)

    setting.predictor = Touching()
    calls = jobs(setting, "labels", peers, ("hann",))
    a_patch = network_ms(setting.patch, setting.classes, device)
    predictor = None if a_patch is None else a_patch * setting.count
    rows = {name: stages(call, device) for name, call in calls.items() if name not in FLOOR}
    print(
        f"\nvolume to labels by stage, ms: {setting.classes} classes, {edge}^3, {patch}^3 patches"
    )
    print(f"  {'':28}" + "".join(f"{stage:>14}" for stage in SPLIT))
    for name, row in rows.items():
        print(f"  {name:28}" + "".join(f"{row[stage]:14.1f}" for stage in SPLIT))
    if predictor is not None:
        print(
            f"  predictor: {predictor:.0f} ms, {setting.count} times the {a_patch:.1f} ms of a "
            "small MONAI UNet"
        )
    return {
        "classes": setting.classes,
        "volume": edge,
        "patch": patch,
        "patches": setting.count,
        "network": "MONAI UNet, channels 16 to 128",
        "network_ms_a_patch": a_patch,
        "predictor_ms": predictor,
        "rows": rows,
    }


# --- memory over classes and depth ----------------------------------------------------------------


def _memory(options: argparse.Namespace, peers: Sequence[str]) -> dict[str, Any]:
    """Peak memory above the inputs, labels out: over the classes, and over the depth."""
    edge, patch = (64, 32) if options.quick else (128, 64)
    depths = [edge, 2 * edge, 4 * edge] if options.quick else options.depths
    classes = options.classes
    print(f"\npeak memory above the inputs, MiB: {edge}x{edge}xD, {patch}^3 patches, labels out")
    result: dict[str, Any] = {"edge": edge, "patch": patch}
    known: dict[tuple[int, int], dict[str, Any]] = {}
    for title, settings in (
        ("over_classes", [(count, depths[min(1, len(depths) - 1)]) for count in classes]),
        ("over_depth", [(classes[-1], depth) for depth in depths]),
    ):
        for setting in settings:
            if setting not in known:
                known[setting] = _peaks(options, peers, edge, patch, *setting)
        result[title] = [known[setting] for setting in settings]
    return result


def _peaks(
    options: argparse.Namespace,
    peers: Sequence[str],
    edge: int,
    patch: int,
    classes: int,
    depth: int,
) -> dict[str, Any]:
    device = torch.device(options.device)
    setting = Setting((edge, edge, depth), patch, classes, device, 1)
    setting.predictor.fresh = True
    features = max(classes // 4, 1)
    weight, bias = torch.randn(classes, features), torch.randn(classes)
    own = {"output": "labels", "window": "gaussian"}
    narrow = NullPredictor(features, setting.patch, 1, device, fresh=True)

    def stream(predictor: NullPredictor, head: Any = None) -> Tensor:
        predictor.restart()
        return voxfuse.sliding_window_inference(
            setting.volume, setting.patch, 1, predictor, OVERLAP, head=head, **own
        )

    calls: dict[str, Call] = {
        "voxfuse": lambda: stream(setting.predictor),
        "voxfuse, head": lambda: stream(narrow, (weight, bias)),
    }
    dense = 4 * classes * edge * edge * depth
    if "monai" in peers and dense <= PEER_LIMIT:
        calls["MONAI"] = lambda: setting.monai().argmax(1)
    if "monai-buffered" in peers and 2 * dense <= PEER_LIMIT:
        calls["MONAI, buffered"] = lambda: setting.monai(buffer_steps=1, buffer_dim=-1).argmax(1)
    if "konfai" in peers and dense <= PEER_LIMIT:
        calls["KonfAI"] = lambda: setting.konfai("labels")
    if "torchio" in peers and 3 * dense <= PEER_LIMIT:
        from torchio import GridAggregator

        calls["TorchIO, hann"] = lambda: setting.aggregator(GridAggregator, "hann").argmax(0)
    plan = voxfuse.PatchFuser((edge, edge, depth), setting.patch, classes, output="labels").plan()
    peaks = {}
    for name, call in calls.items():
        peaks[name] = harness.peak_extra_bytes(call, device, warm=0 if name != "voxfuse" else 1)
        gc.collect()
    listed = ", ".join(f"{name} {value / 2**20:.0f}" for name, value in peaks.items())
    print(f"  {classes:4} classes, D = {depth:5}: {listed}")
    return {
        "classes": classes,
        "depth": depth,
        "features": features,
        "planned": plan.ring_bytes + plan.output_bytes,
        "dense": dense,
        "peaks": peaks,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available(wanted: Sequence[str], device: torch.device) -> list[str]:
    """The peers that are installed and run on the device; says which are left out."""
    found = []
    for name in wanted:
        if name not in PEERS:
            raise SystemExit(f"--peers: got {name!r}, expected some of {', '.join(PEERS)}")
        if importlib.util.find_spec(PEERS[name]) is None:
            print(f"{name} left out: not installed")
        elif name == "torchio" and device.type != "cpu":
            print("torchio left out: its aggregator works on the CPU alone")
        else:
            found.append(name)
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return everything as data."""
    device = torch.device(options.device)
    unknown = set(options.parts) - {"time", "soft", "split", "memory", "bars", "example"}
    if unknown:
        raise SystemExit(f"--parts: got {', '.join(sorted(unknown))}")
    if device.type != "cpu" and {"bars", "example"} & set(options.parts):
        raise SystemExit("--parts: bars and example are measured on the CPU alone")
    peers = available(options.peers, device)
    results: dict[str, Any] = {"benchmark": "fusion", "machine": harness.machine(device)}
    for name in sorted({PEERS[peer] for peer in peers}):
        results["machine"][name] = importlib.metadata.version(name)
    with torch.no_grad():
        if "time" in options.parts:
            results["time"] = [_time(options, peers, output) for output in ("logits", "labels")]
        if "soft" in options.parts:
            results["soft"] = _soft(options, peers)
        if "split" in options.parts:
            results["split"] = _split(options, peers)
        if "memory" in options.parts:
            results["memory"] = _memory(options, peers)
        # Last: what the process keeps would count in the peaks.
        if "time" in options.parts and device.type == "cpu":
            print("\nthe same, freed memory kept for the next result:")
            harness.allocate_reused()
            results["time_reused"] = [
                _time(options, peers, output) for output in ("logits", "labels")
            ]
            harness.allocate_fresh()
    if "bars" in options.parts:
        results["bars"] = fusion_memory.run(options.quick)
    if "example" in options.parts:
        results["example"] = fusion_memory.run_example(options.quick)
    return results
