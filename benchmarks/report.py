"""Write the benchmark tables of the documentation from committed measurements.

python benchmarks/report.py            # rewrite the pages between their markers
python benchmarks/report.py --check    # fail if a page is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"


def loss_table(results: dict[str, Any]) -> str:
    """One row a shape: time of forward + backward and memory, beside the peers."""
    machine = results["machine"]
    lines = [
        f"Tversky loss, forward + backward, float32, {machine['cpu']} with {machine['threads']} "
        f"threads ({machine['cpu_capability']}), torch {machine['torch']}, each implementation "
        "allocating its gradient, minimum of interleaved rounds. Memory is what is alive at the "
        "peak beyond logits and gradient.",
        "",
        "| logits | voxfuse | MONAI | nnU-Net Dice | torch.compile, best form | voxfuse memory | "
        "MONAI memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape in results["shapes"]:
        fresh = shape["fresh"]
        own = fresh["voxfuse"]["min_ms"]
        cells = [f"({', '.join(map(str, shape['shape']))})", f"{own:.1f} ms"]
        compiled = [name for name in fresh if name.startswith("compile")]
        best = min(compiled, key=lambda name: fresh[name]["min_ms"]) if compiled else ""
        for name in ("monai", "nnunet", best):
            if name in fresh:
                time = fresh[name]["min_ms"]
                cells.append(f"{time:.0f} ms ({time / own:.1f}x)")
            else:
                cells.append("not measured")
        for name in ("voxfuse", "monai"):
            beyond = shape["peak_extra_bytes"].get(name)
            if beyond is None:
                cells.append("not measured")
            else:
                cells.append(f"{max(0, beyond - shape['gradient_bytes']) / 2**20:.1f} MiB")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Measured at commit {machine['commit']} ({machine['time'][:10]})."]
    return "\n".join(lines)


def fusion_table(results: dict[str, Any]) -> str:
    """One row a way to fuse: time to the volume and to labels; then the peaks at full size."""
    machine = results["machine"]
    volume, labels = results["time"]
    shape = (
        f"{volume['classes']} classes, {volume['volume']}^3 voxels, {volume['patches']} patches of "
        f"{volume['patch']}^3"
    )
    lines = [
        f"Fusion without the network: {shape}, float32, {machine['cpu']} with {machine['threads']} "
        f"threads ({machine['cpu_capability']}), torch {machine['torch']}, median of interleaved "
        "rounds. Reading the patches once takes "
        f"{volume['rows']['read']['median_ms']:.0f} ms.",
        "",
        "| | volume of all classes | labels |",
        "|---|---|---|",
    ]
    for name, row in volume["rows"].items():
        if name in ("read", "copy"):
            continue
        cells = [name]
        for timed in (row, labels["rows"].get(name)):
            cells.append(f"{timed['median_ms']:.0f} ms" if timed else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Peak memory above the inputs, labels out, patches of 96^3, overlap 0.5 (0.25 in the "
        "example):",
        "",
        "| | voxels | voxfuse | sums of all classes of the volume |",
        "|---|---|---|---|",
    ]
    for case in results["bars"]:
        if case["name"].endswith("first"):
            continue  # The long axis last needs the same.
        what = f"{case['classes']} classes"
        what += f" from {case['features']} features" if case["features"] else ""
        what += ", into a memmap" if case["memmap"] else ""
        peak = case["anonymous_bytes"] if case["memmap"] else case["peak_bytes"]
        note = " anonymous memory of the whole process" if case["memmap"] else ""
        lines.append(
            f"| {what} | {'x'.join(map(str, case['shape']))} | {peak / 2**30:.2f} GiB{note} | "
            f"{case['dense_bytes'] / 2**30:.1f} GiB |"
        )
    example = results["example"]
    for key, what in (
        ("plain", ""),
        ("features", f" from {example['features']['channels']} features"),
    ):
        row = example[key]
        lines.append(
            f"| {example['classes']} classes{what}, `examples/many_labels.py` | "
            f"{'x'.join(map(str, example['shape']))} | {row['peak_bytes'] / 2**30:.2f} GiB | "
            f"{row['dense_bytes'] / 2**30:.1f} GiB |"
        )
    lines += ["", f"Measured at commit {machine['commit']} ({machine['time'][:10]})."]
    return "\n".join(lines)


def head_table(results: dict[str, Any]) -> str:
    """Memory over the volume and the classes, time, and the fused loss's time over the unfused."""
    machine, memory = results["machine"], results["memory"]

    def cell(row: dict[str, Any], name: str) -> str:
        extra = row["extra_bytes"].get(name)
        return "not measured" if extra is None else f"{extra / 2**20:.0f} MiB"

    first = memory["volumes"][0]
    head = "fused | convolution, voxfuse's loss | convolution, MONAI's loss |"
    lines = [
        f"Dice + cross-entropy, forward + backward, {results['dtype']}, {machine['cpu']} with "
        f"{machine['threads']} threads ({machine['cpu_capability']}), torch {machine['torch']}, "
        f"K = {first['features']} features. Peak memory is what is alive beyond the inputs and the "
        "gradients; what the machine could not hold safely was not measured.",
        "",
        f"| classes | patches | logits | {head}",
        "|---|---|---|---|---|---|",
    ]
    for row in memory["classes"] + memory["volumes"]:
        lines.append(
            f"| {row['classes']} | {row['batch']} x {row['edge']}³ | "
            f"{row['logit_bytes'] / 2**20:.0f} MiB | {row['extra_bytes']['fused'] / 2**20:.1f} MiB "
            f"| {cell(row, 'unfused')} | {cell(row, 'eager')} |"
        )
    lines += [
        "",
        f"Time, minimum of interleaved rounds, with what the fused loss takes of it:\n\n"
        f"| classes | patches | {head} MONAI's, compiled | plain PyTorch, compiled |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["time"]:
        own = row["losses"]["fused"]
        cells = [f"{own['min_ms']:.0f} ms (median {own['median_ms']:.0f})"]
        for name in ("unfused", "eager", "compiled", "compiled plain"):
            one = row["losses"].get(name)
            cells.append(
                f"{one['min_ms']:.0f} ms ({one['fused_over_it']:.2f})" if one else "not measured"
            )
        lines.append(
            f"| {row['classes']} | {row['batch']} x {row['edge']}³ | " + " | ".join(cells) + " |"
        )
    sweep = results["sweep"]
    counts = list(dict.fromkeys(row["classes"] for row in sweep))
    ratios = {(row["features"], row["classes"]): row["fused_over_unfused"] for row in sweep}
    slower = [f"K = {k}, C = {c}" for (k, c), ratio in ratios.items() if ratio > 1]
    lines += [
        "",
        f"Time of the fused loss over that of convolution and voxfuse's loss, one "
        f"{sweep[0]['edge']}³ patch; the fused one is "
        + (f"the slower one at {'; '.join(slower)}" if slower else "faster everywhere here")
        + ":\n",
        "| | " + " | ".join(f"C = {count}" for count in counts) + " |",
        "|---|" + "---|" * len(counts),
    ]
    for features in dict.fromkeys(row["features"] for row in sweep):
        cells = [f"{ratios[features, count]:.2f}" for count in counts]
        lines.append(f"| K = {features} | " + " | ".join(cells) + " |")
    lines += ["", f"Measured at commit {machine['commit']} ({machine['time'][:10]})."]
    return "\n".join(lines)


#: Page, name of its markers, results, and what makes the table of them.
TABLES = [
    ("README.md", "loss-table", "loss.json", loss_table),
    ("README.md", "fusion-table", "fusion.json", fusion_table),
    ("docs/head_fused_loss.md", "head-table", "head.json", head_table),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for name, marker, file, table in TABLES:
        page = ROOT / name
        text = page.read_text()
        begin, end = f"<!-- {marker}:begin -->", f"<!-- {marker}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            sys.exit(f"{name} has no {begin} ... {end}")
        made = f"{begin}\n{table(json.loads((RESULTS / file).read_text()))}\n{end}"
        updated = pattern.sub(made.replace("\\", r"\\"), text)
        if not options.check:
            page.write_text(updated)
            print(f"{name}: table of {file}")
        elif updated != text:
            sys.exit(f"{name} is out of date: run python benchmarks/report.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
