"""The tables of the documentation, made from committed measurements.

The site makes its tables when it is built. README is read without being built and has one between
markers; figures in prose are listed below as templates. Both are compared with the files.

python benchmarks/report.py            # rewrite the table of README
python benchmarks/report.py --check    # fail if it, or a figure in prose, is not that of its file
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"

Results = dict[str, Any]


def load(name: str) -> Results:
    """The committed measurements of that name."""
    found: Results = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def source(name: str) -> str:
    """Whose figures these are: machine, versions, commit, file."""
    machine = load(name)["machine"]
    threads = f"{machine['threads']} thread" + ("s" if machine["threads"] > 1 else "")
    return (
        f"{machine['cpu']}, {threads}, {machine['cpu_capability']}; PyTorch {machine['torch']}; "
        f"commit {machine['commit']}, {machine['time'][:10]}: `benchmarks/results/cpu/{name}.json`"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shape(shape: Sequence[int]) -> str:
    """(1, 4, 128, 128, 128) as (1, 4, 128³), (96, 96, 96) as 96³, other extents with crosses."""
    *front, a, b, c = shape
    spatial = f"{a}³" if a == b == c else f"{a} x {b} x {c}"
    return f"({', '.join(map(str, front))}, {spatial})" if front else spatial


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{max(0, count) / 2**20:.1f} MiB"


def _ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _best_compiled(times: Results) -> str:
    compiled = [name for name in times if name.startswith("compile")]
    return min(compiled, key=lambda name: times[name]["min_ms"])


# --- Tables of the site ---------------------------------------------------------------------------


def loss(allocation: str) -> str:
    """One row a shape: time of forward and backward, beside the peers."""
    rows = []
    for shape in load("loss")["shapes"]:
        times = shape[allocation]
        own = times["voxfuse"]["min_ms"]
        peers = [times[name]["min_ms"] for name in ("monai", "nnunet", _best_compiled(times))]
        cells = [f"{_ms(time)} ({time / own:.1f}x)" for time in peers]
        rows.append([_shape(shape["shape"]), _ms(own), *cells])
    return _table(
        ["logits", "voxfuse", "MONAI", "nnU-Net's Dice", "torch.compile, best form"], rows
    )


def loss_memory() -> str:
    """One row a shape: bytes at the peak beyond logits and gradient."""
    rows = []
    for shape in load("loss")["shapes"]:
        peaks = shape["peak_extra_bytes"]
        compiled = min((n for n in peaks if n.startswith("compile")), key=peaks.__getitem__)
        names = ("voxfuse", "monai", "nnunet", compiled)
        beyond = [_size(peaks[name] - shape["gradient_bytes"]) for name in names]
        rows.append([_shape(shape["shape"]), *beyond])
    return _table(["logits", "voxfuse", "MONAI", "nnU-Net's Dice", "torch.compile, least"], rows)


def loss_exacta() -> str:
    names = ("voxfuse", "exacta", "monai")
    rows = [
        [_shape(shape["shape"]), *(_ms(shape["reused"][name]["min_ms"]) for name in names)]
        for shape in load("loss_exacta")["shapes"]
    ]
    return _table(["logits", "voxfuse", "exacta 0.0.1a5", "MONAI"], rows)


def fusion(name: str) -> str:
    """One row a way to fuse: time to the volume and to labels."""
    volume, labels = load(name)["time"]
    rows = []
    for way, row in volume["rows"].items():
        if way != "copy":
            times = [row, labels["rows"].get(way)]
            said = "reading the patches once" if way == "read" else way
            rows.append([said, *(_ms(time["median_ms"]) if time else "" for time in times)])
    return _table(["", "volume of all classes", "labels"], rows)


def fusion_memory() -> str:
    """One row a case at full size: its peak, and what the sums of all classes alone would take."""
    results = load("fusion")
    rows = []
    for case in results["bars"]:
        if case["name"].endswith("first"):
            continue  # The long axis last needs the same.
        what = f"{case['classes']} classes"
        what += f" from {case['features']} features" if case["features"] else ""
        peak = _size(case["peak_bytes"])
        if case["memmap"]:
            what += ", into a memory map"
            peak = f"{_size(case['anonymous_bytes'])} anonymous memory of the whole process"
        rows.append([what, _shape(case["shape"]), peak, _size(case["dense_bytes"])])
    example = results["example"]
    for row in (example["plain"], example["features"]):
        what = f"{example['classes']} classes"
        what += f" from {row['channels']} features" if row is example["features"] else ""
        sizes = (_size(row["peak_bytes"]), _size(row["dense_bytes"]))
        rows.append([f"{what}, `examples/many_labels.py`", _shape(example["shape"]), *sizes])
    return _table(["", "voxels", "peak, labels out", "sums of all classes of the volume"], rows)


HEAD = ("fused", "convolution, voxfuse's loss", "convolution, MONAI's loss")


def head_memory() -> str:
    memory = load("head")["memory"]
    rows = []
    for row in memory["classes"] + memory["volumes"]:
        found = [row["extra_bytes"].get(name) for name in ("fused", "unfused", "eager")]
        rows.append(
            [f"{row['classes']}", f"{row['batch']} x {row['edge']}³", _size(row["logit_bytes"])]
            + ["not measured" if extra is None else _size(extra) for extra in found]
        )
    return _table(["classes", "patches", "logits", *HEAD], rows)


def head_time() -> str:
    rows = []
    for row in load("head")["time"]:
        losses = row["losses"]
        cells = [f"{_ms(losses['fused']['min_ms'])} (median {_ms(losses['fused']['median_ms'])})"]
        for name in ("unfused", "eager", "compiled plain"):
            cells.append(f"{_ms(losses[name]['min_ms'])} ({losses[name]['fused_over_it']:.2f})")
        rows.append([f"{row['classes']}", f"{row['batch']} x {row['edge']}³", *cells])
    return _table(["classes", "patches", *HEAD, "plain PyTorch, compiled"], rows)


def head_sweep() -> str:
    """The fused loss's time over that of convolution and loss, features by classes."""
    sweep = load("head")["sweep"]
    ratios = {(row["features"], row["classes"]): row["fused_over_unfused"] for row in sweep}
    features, classes = (list(dict.fromkeys(axis)) for axis in zip(*ratios, strict=True))
    rows = [[f"K = {k}", *(f"{ratios[k, c]:.2f}" for c in classes)] for k in features]
    return _table(["", *(f"C = {c}" for c in classes)], rows)


def counting() -> str:
    found: dict[str, dict[str, Results]] = {}
    for row in load("counting")["rows"]:
        found.setdefault(_shape(row["shape"]), {})[row["way"]] = row
    ways = ["voxfuse, argmax", "voxfuse, threshold", "MONAI DiceMetric", "nnU-Net"]
    rows = [
        [shape, _ms(by["reading"]["min_ms"])]
        + [f"{_ms(by[way]['min_ms'])}, {_size(by[way]['peak_bytes'])}" for way in ways]
        for shape, by in found.items()
    ]
    return _table(["logits, labels of 8 bits", "reading the logits", *ways], rows)


def resample() -> str:
    """One row a case: seconds on one and on two threads."""
    found: dict[str, dict[int, Results]] = {}
    for row in load("resample")["rows"]:
        case = f"{row['classes']} classes, {_shape(row['source'])} to {_shape(row['target'])}"
        case += ", first axis nearest" if row["order"][0] == 0 else ""
        found.setdefault(case, {})[row["threads"]] = row["seconds"]
    ways = {
        "voxfuse": "voxfuse, AVX-512",
        "voxfuse, AVX2": "voxfuse, AVX2",
        "read and write": "logits read, labels written",
        "PyTorch": "plain PyTorch, slab by slab",
        "nnU-Net": "scikit-image and argmax (one thread)",
    }
    rows = [
        [case]
        + [
            " / ".join(f"{times[way]:.3g} s" for times in by.values() if way in times)
            for way in ways
        ]
        for case, by in found.items()
    ]
    return _table(["", *ways.values()], rows)


def nnunet() -> str:
    parts = load("nnunet")["parts"]
    rows = []
    for name, part in (("nnU-Net", "peer"), ("voxfuse", "ours"), ("voxfuse", "ct")):
        row = parts[part]
        what = f"{name}, {_shape(row['shape'])} to {_shape(row['target'])}, tiles of {row['tile']}³"
        stages = [*row["seconds"].values(), _outside_the_network(row)]
        rows.append([what, *(f"{one:.1f} s" for one in stages), _size(row["peak_bytes"])])
    head = ["network", "fusion", "export", "outside the network", "peak above the image"]
    return _table(["", *head], rows)


def _outside_the_network(part: Results) -> float:
    return float(part["seconds"]["fusion"] + part["seconds"]["export"])


def metrics() -> str:
    rows = []
    for row in load("metrics")["rows"]:
        if row["surface"] == "voxels":
            lesions, seconds = f"{row['true_lesions']:.0f}", f"{row['seconds']:.2f} s"
            cells = [_shape(row["shape"]), lesions, seconds, _size(row["peak_bytes"])]
            rows.append([row["scan"], *cells])
    return _table(["scan", "voxels", "lesions", "all metrics, three rules", "peak"], rows)


def ms_lesions() -> str:
    """One row a patient: Dice of every seed, and the means."""
    runs = load("ms_lesions")["runs"]
    rows = []
    for patient in runs[0]["scores"]:
        scores = [run["scores"][patient] for run in runs]
        means = (sum(s[key] for s in scores) / len(runs) for key in ("dice", "recall", "precision"))
        rows.append([patient, *(f"{s['dice']:.3f}" for s in scores), *(f"{m:.3f}" for m in means)])
    seeds = [f"seed {run['seed']}" for run in runs]
    return _table(["patient", *seeds, "mean", "recall", "precision"], rows)


def ms_lesions_simulated() -> str:
    """One row a patient: Dice of every seed without and with simulated lesions, and the change."""
    found = load("ms_lesions_simulated")
    rows = []
    for patient, changes in found["differences"].items():
        pairs = [
            f"{before['scores'][patient]['dice']:.3f} / {after['scores'][patient]['dice']:.3f}"
            for before, after in zip(found["against"], found["runs"], strict=True)
        ]
        rows.append([patient, *pairs, f"{sum(changes) / len(changes):+.3f}"])
    seeds = [f"seed {run['seed']}" for run in found["runs"]]
    return _table(["patient", *seeds, "mean change"], rows)


def simulated_head() -> str:
    """One row a head: Dice, and its lesions."""
    rows = []
    for head, row in load("simulated_head")["report"]["subjects"].items():
        lesions = [row[f"lesions_{name}"] for name in ("truth", "missed", "prediction", "false")]
        cells = [f"{row['truth_ml']:.1f} ml", f"{row['dice']:.3f}", *map(str, lesions)]
        rows.append([head, *cells])
    return _table(
        ["head", "lesions", "Dice", "lesions, number", "missed", "predicted", "false"], rows
    )


def simulated_head_sizes() -> str:
    """One row a class of sizes: how many there are, and which share is found, and is right."""
    shares = ("sensitivity", "precision")
    rows = [
        [row["mm3"], str(row["lesions_truth"]), *(_share(row[name]) for name in shares)]
        for row in load("simulated_head")["report"]["sizes"]
    ]
    return _table(["mm³", "lesions", "found", "of the predicted ones, true"], rows)


def _share(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.0%}"


def reference() -> str:
    rows = [
        [what, *(_ms(row[way]["min_ms"]) for way in ("compiled", "reference"))]
        for what, row in load("reference")["rows"].items()
    ]
    return _table(["", "compiled", "reference"], rows)


#: Name on the site -> file of results, and what makes the table.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "loss": ("loss", lambda: loss("fresh")),
    "loss-reused": ("loss", lambda: loss("reused")),
    "loss-memory": ("loss", loss_memory),
    "loss-exacta": ("loss_exacta", loss_exacta),
    "fusion": ("fusion", lambda: fusion("fusion")),
    "fusion-konfai": ("fusion_konfai", lambda: fusion("fusion_konfai")),
    "fusion-memory": ("fusion", fusion_memory),
    "head-memory": ("head", head_memory),
    "head-time": ("head", head_time),
    "head-sweep": ("head", head_sweep),
    "counting": ("counting", counting),
    "resample": ("resample", resample),
    "nnunet": ("nnunet", nnunet),
    "metrics": ("metrics", metrics),
    "ms-lesions": ("ms_lesions", ms_lesions),
    "ms-lesions-simulated": ("ms_lesions_simulated", ms_lesions_simulated),
    "simulated-head": ("simulated_head", simulated_head),
    "simulated-head-sizes": ("simulated_head", simulated_head_sizes),
    "reference": ("reference", reference),
}


# --- README ---------------------------------------------------------------------------------------


def readme() -> str:
    """A row a subject: voxfuse and its fastest or most used peer."""
    shape = load("loss")["shapes"][-1]
    reused, fresh, peaks = shape["reused"], shape["fresh"], shape["peak_extra_bytes"]

    def times(measured: Results) -> list[str]:
        compiled = measured[_best_compiled(measured)]["min_ms"]
        monai = f"MONAI {_ms(measured['monai']['min_ms'])}, compiled PyTorch {_ms(compiled)}"
        return [_ms(measured["voxfuse"]["min_ms"]), monai]

    volume, labels = (part["rows"] for part in load("fusion")["time"])
    features = next(c for c in load("fusion")["bars"] if c["features"] and c["shape"][-1] == 1024)
    head = load("head")["time"][-1]["losses"]
    memory = next(r for r in load("head")["memory"]["volumes"] if r["edge"] == 96)["extra_bytes"]
    count = {row["way"]: row for row in load("counting")["rows"] if row["shape"][1] == 4}
    parts = load("nnunet")["parts"]
    rows = [
        [f"Tversky loss and gradient, {_shape(shape['shape'])}", *times(reused)],
        ["the same, into fresh memory", *times(fresh)],
        [
            "the same, memory beyond logits and gradient",
            _size(peaks["voxfuse"] - shape["gradient_bytes"]),
            f"MONAI {_size(peaks['monai'] - shape['gradient_bytes'])}",
        ],
        [
            "last layer with Dice and cross-entropy, 117 classes, 96³",
            _ms(head["fused"]["min_ms"]),
            f"MONAI {_ms(head['eager']['min_ms'])}, "
            f"compiled PyTorch {_ms(head['compiled plain']['min_ms'])}",
        ],
        [
            "the same for two patches, memory beside features and gradients",
            _size(memory["fused"]),
            f"voxfuse's loss of the logits {_size(memory['unfused'])}",
        ],
        [
            "125 patches of 96³ fused into 4 classes at 256³",
            _ms(volume["voxfuse"]["median_ms"]),
            f"MONAI {_ms(volume['MONAI']['median_ms'])}",
        ],
        [
            "the same, into labels",
            _ms(labels["voxfuse"]["median_ms"]),
            f"MONAI {_ms(labels['MONAI']['median_ms'])}",
        ],
        [
            f"labels of 117 classes at {_shape(features['shape'])} from 32 features, memory",
            _size(features["peak_bytes"]),
            f"sums of all classes {_size(features['dense_bytes'])}",
        ],
        [
            "nnU-Net's prediction beside its network, 117 classes, 128³ to 256³",
            f"{_outside_the_network(parts['ours']):.1f} s",
            f"nnU-Net {_outside_the_network(parts['peer']):.0f} s",
        ],
        [
            "counts of a validation, (1, 4, 128³)",
            _ms(count["voxfuse, argmax"]["min_ms"]),
            f"MONAI's `DiceMetric` {_ms(count['MONAI DiceMetric']['min_ms'])}",
        ],
    ]
    return _table(["on a CPU", "voxfuse", ""], rows)


# --- Figures in prose -----------------------------------------------------------------------------


def _range(values: Iterable[float], form: str) -> str:
    values = list(values)
    return f"{min(values):{form}} to {max(values):{form}}"


def figures() -> Iterator[tuple[str, str, str]]:
    """Page, file, and words of the page with the figures of that file in them."""
    page = "docs/performance.md"
    shapes = load("loss")["shapes"]

    def over(name: str, base: str, form: str, of: Iterable[Results] = shapes) -> str:
        return _range((s["reused"][name]["min_ms"] / s["reused"][base]["min_ms"] for s in of), form)

    large = over("operator", "floor", ".1f", [s for s in shapes if s["shape"][2] == 192])
    scaling = load("loss")["scaling"]
    for words in (
        f"take {over('operator', 'floor', '.1f')} times the floor",
        f"{large.replace(' to ', ' and ')} times at 192³",
        f"bfloat16 takes {over('operator bfloat16', 'operator', '.2f')} times as long",
        f"float16 {over('operator float16', 'operator', '.2f')} times",
        f"the full statistics {over('operator full', 'operator', '.1f')} times",
        f"channels-last {over('operator channels-last', 'operator', '.2f')} times",
        f"Two threads take {1 / scaling['speedup over one thread']:.2f} of the time",
    ):
        yield page, "loss", words
    floors = [
        {"AVX-512": row["seconds"]["voxfuse"], "AVX2": row["seconds"]["voxfuse, AVX2"]}
        | {"floor": row["seconds"]["read and write"]}
        for row in load("resample")["rows"]
        if row["classes"] == 4
    ]
    ratios = [_range((t[way] / t["floor"] for t in floors), ".1f") for way in ("AVX-512", "AVX2")]
    yield page, "resample", f"{ratios[0]} times the floor with AVX-512 and {ratios[1]} times with"
    first = load("resample")["rows"][0]["peak_extra_bytes"]
    yield page, "resample", f"({first / 2**20:.0f} MiB for the first case)"

    page, parts = "docs/nnunet.md", load("nnunet")["parts"]
    flat = [(row["peaks"]["ours"] - row["label_bytes"]) / 2**20 for row in parts["memory"]]
    depths = [row["depth"] for row in parts["memory"]]
    check = parts["check"]
    for words in (
        f"{flat[0]:.0f} MiB beside the labels at D = {depths[0]}, {flat[-1]:.0f} MiB at "
        f"D = {depths[-1]}",
        f"{check['ours']['voxels']} of ours differ",
        f"at most {check['ours']['greatest_gap']:.1e} apart".replace("e-0", "e-"),
        f"{check['peer']['voxels']:,} do, {check['peer']['share']:.2%}".replace("%", " %"),
        f"up to {check['peer']['greatest_gap']:.2f}",
    ):
        yield page, "nnunet", words

    page, rows = "docs/evaluation.md", load("metrics")["rows"]
    by = {
        surface: _range((r["seconds"] for r in rows if r["surface"] == surface), ".2f")
        for surface in ("voxels", "areas")
    }
    yield page, "metrics", f"take {by['voxels']} s on one core ({by['areas']} s with areas)"
    yield page, "metrics", f"at most {max(row['peak_bytes'] for row in rows) / 2**20:.0f} MiB"

    page = "docs/training.md"
    for name, words in (
        ("ms_lesions", "mean of the first two is"),
        ("ms_lesions_zscore", "mean was"),
    ):
        scores = [run["scores"] for run in load(name)["runs"]]
        two = [s[patient]["dice"] for s in scores for patient in ("lesjak19", "lesjak07")]
        yield page, name, f"{words} {sum(two) / len(two):.3f}"
    turned = {
        run["normalisation"]: [f"{score['dice']:.3f}" for score in run["scores"].values()]
        for run in load("ms_lesions_turned")["runs"]
        if not run["loss_inside_mask"]
    }
    robust, zscore = ("{}, {} and {}".format(*turned[which]) for which in ("robust", "zscore"))
    yield page, "ms_lesions_turned", f"{robust} in place of {zscore}"
    (head,) = load("simulated_head")["runs"]
    yield page, "simulated_head", f"Training took {head['seconds']:.0f} s with one thread"
    dice = [f"{score['dice']:.3f}" for score in head["scores"].values()]
    yield page, "simulated_head", "is {} and {}".format(*dice)
    page, runs = "docs/predict.md", load("cluster")["runs"]
    for words in (
        f"{_range((r['two']['seconds']['boxes'] for r in runs), '.1f')} s for what one took "
        f"{_range((r['one']['seconds']['boxes'] for r in runs), '.1f')} s",
        f"{_range((r['times']['boxes'] for r in runs), '.2f')} times",
        f"{_range((r['times']['whole'] for r in runs), '.2f')} times",
    ):
        yield page, "cluster", words
    night = load("night")
    yield page, "night", f"of {night['studies']} studies of about {night['edge']}^3 voxels"
    yield page, "night", f"{100 * night['share']:.0f} % of the time was the network's"
    runs = load("volumes")["runs"]
    peaks = "{}, {} and {}".format(*(f"{run['peak_bytes'] / 2**20:,.0f}" for run in runs))
    beside = (f"{100 * run['share_beside_network_and_reading']:.1f}" for run in runs)
    yield "docs/volumes.md", "volumes", f"the peak above the model is {peaks} MiB"
    yield "docs/volumes.md", "volumes", "take {}, {} and {} % of the time".format(*beside)
    page = "docs/training.md"
    yield page, "training", f"the log take {load('training')['share']:.1%}".replace("%", " %")


# --------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def wrong() -> list[str]:
    """Figures that stand on a page and are not those of their file."""
    pages: dict[str, str] = {}
    found = []
    for page, name, words in figures():
        text = pages.setdefault(page, " ".join((ROOT / page).read_text().split()))
        if words not in text:
            found.append(f"{page} should say {words!r}, by benchmarks/results/cpu/{name}.json")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = ROOT / "README.md"
    text = page.read_text()
    before, rest = text.split(BEGIN)
    updated = f"{before}{BEGIN}\n{readme()}\n{END}{rest.split(END)[1]}"
    if not options.check:
        page.write_text(updated)
    found = wrong()
    if options.check and updated != text:
        found.append("README.md: its table is not that of the files: python benchmarks/report.py")
    print(*found, sep="\n", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
