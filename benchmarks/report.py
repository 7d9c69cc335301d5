"""Write the README's benchmark tables from committed measurements.

python benchmarks/report.py            # rewrite README.md between its markers
python benchmarks/report.py --check    # fail if the README is out of date
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOSS = ROOT / "benchmarks" / "results" / "cpu" / "loss.json"
FUSION = LOSS.with_name("fusion.json")


def loss_table(results: dict[str, Any]) -> str:
    """One row a shape: time of forward + backward and memory, beside the peers."""
    machine = results["machine"]
    lines = [
        f"Tversky loss, forward + backward, float32, {machine['cpu']} with {machine['threads']} "
        f"threads ({machine['cpu_capability']}), torch {machine['torch']}, everybody allocating "
        "their gradient, minimum of interleaved rounds. Memory is what is alive at the peak beyond "
        "logits and gradient.",
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


TABLES = {"loss-table": (LOSS, loss_table), "fusion-table": (FUSION, fusion_table)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = updated = readme.read_text()
    for name, (path, table) in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(updated):
            sys.exit(f"README.md has no {begin} ... {end}")
        content = f"{begin}\n{table(json.loads(path.read_text()))}\n{end}"
        updated = pattern.sub(lambda _, content=content: content, updated)
    if options.check:
        if updated != text:
            sys.exit("README.md is out of date: run python benchmarks/report.py")
        return 0
    readme.write_text(updated)
    print(f"README.md: {', '.join(TABLES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
