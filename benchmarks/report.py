"""Write the README's benchmark table from committed measurements.

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
BEGIN, END = "<!-- loss-table:begin -->", "<!-- loss-table:end -->"


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(text):
        sys.exit(f"README.md has no {BEGIN} ... {END}")
    table = loss_table(json.loads(LOSS.read_text()))
    updated = pattern.sub(lambda _: f"{BEGIN}\n{table}\n{END}", text)
    if options.check:
        if updated != text:
            sys.exit("README.md is out of date: run python benchmarks/report.py")
        return 0
    readme.write_text(updated)
    print(f"README.md: table of {len(json.loads(LOSS.read_text())['shapes'])} shapes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
