"""Pictures of benchmark results, drawn from their JSON."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

COLOURS = {
    "voxfuse": "#0b6e4f",
    "monai": "#c8553d",
    "nnunet": "#6a4c93",
    "plain": "#8d99ae",
    "compiled": "#e09f3e",
    "floor": "#2b2d42",
}

#: Cutting, fusion, finalisation, allocation and the rest.
STAGE_COLOURS = ("#8d99ae", "#0b6e4f", "#e09f3e", "#6a4c93", "#d9d9d9")


#: Of text and axes in a picture that takes them from the page around it.
INK = "#010203"


def inline(results: dict[str, Any]) -> str:
    """The picture as SVG for a page of the site, in colours that its style sheet may change."""
    parts = ("text.", "axes.edge", "axes.label", "axes.title", "xtick.", "ytick.", "grid.")
    colours = {f"{part}color": INK for part in parts}
    others = {
        "svg.fonttype": "none",
        "savefig.transparent": True,
        "font.size": 11,
        "legend.fontsize": 9,
    }
    with plt.rc_context({**colours, **others}):
        file = io.BytesIO()
        draw(results, file)
    svg = file.getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--plot-{name}, {colour})")
    # A page may have several pictures: their parts need other names.
    kind = results["benchmark"]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{kind}-", svg)
    return re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)


def draw(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Draw what fits the kind of benchmark."""
    drawings = {
        "loss": draw_loss,
        "sweep": draw_sweep,
        "step": draw_step,
        "fusion": draw_fusion,
        "head": draw_head,
        "nnunet": draw_nnunet,
        "training": draw_training,
        "tutorial": draw_tutorial,
        "slice": draw_slice,
    }
    drawings[results["benchmark"]](results, path)


def _label(shape: list[int]) -> str:
    batch, classes, *spatial = shape
    volume = f"{spatial[0]}³" if len(set(spatial)) == 1 else "x".join(map(str, spatial))
    return f"{classes} classes\n{volume}" if batch == 1 else f"{batch} x {classes}\n{volume}"


def draw_loss(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Bars: time of forward + backward, and memory beyond logits and gradient, by shape."""
    shapes = results["shapes"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), constrained_layout=True)
    rows: list[tuple[str, list[float], list[float]]] = []
    for key, label in (
        ("voxfuse", "voxfuse"),
        ("compiled", "torch.compile (best form)"),
        ("nnunet", "nnU-Net Dice, eager"),
        ("plain", "plain PyTorch"),
        ("monai", "MONAI"),
    ):
        times, memory = [], []
        for shape in shapes:
            fresh = shape["fresh"]
            name = key
            if key == "compiled":
                candidates = [n for n in fresh if n.startswith("compile")]
                name = min(candidates, key=lambda n: fresh[n]["min_ms"]) if candidates else ""
            if name in fresh:
                times.append(fresh[name]["min_ms"])
                beyond = shape["peak_extra_bytes"][name] - shape["gradient_bytes"]
                memory.append(max(beyond / 2**20, 0.01))
            else:
                times.append(float("nan"))
                memory.append(float("nan"))
        rows.append((label, times, memory))
    width = 0.8 / len(rows)
    positions = range(len(shapes))
    for index, (label, times, memory) in enumerate(rows):
        colour = list(COLOURS.values())[[0, 4, 2, 3, 1][index]]
        offset = (index - (len(rows) - 1) / 2) * width
        left.bar([p + offset for p in positions], times, width, label=label, color=colour)
        right.bar([p + offset for p in positions], memory, width, color=colour)
    for index, shape in enumerate(shapes):
        floor = shape["reused"]["floor"]["min_ms"]
        left.hlines(
            floor,
            index - 0.42,
            index + 0.42,
            color=COLOURS["floor"],
            linewidth=1.2,
            linestyle="--",
            label="read once + copy once" if index == 0 else None,
        )
    for axis, title, unit in (
        (left, "Tversky loss, forward + backward", "milliseconds"),
        (right, "Memory beyond logits and gradient", "MiB"),
    ):
        axis.set_yscale("log")
        axis.set_xticks(list(positions), [_label(shape["shape"]) for shape in shapes])
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    _finish(figure, results, path)


def _finish(figure: Any, results: dict[str, Any], path: Path | io.BytesIO) -> None:
    machine = results["machine"]
    figure.suptitle(
        f"{machine.get('gpu') or machine['cpu']} "
        f"({machine['threads']} thread{'s' if machine['threads'] > 1 else ''}), "
        f"torch {machine['torch']}, commit {machine['commit']}",
        fontsize="small",
    )
    _save(figure, path)


def _save(figure: Any, path: Path | io.BytesIO) -> None:
    figure.savefig(path, dpi=130, format="svg" if isinstance(path, io.BytesIO) else None)
    plt.close(figure)


def draw_sweep(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Lines: time and memory over the volume at 2 classes, and over the classes at 64^3."""
    shapes = results["shapes"]
    volumes = [row for row in shapes if row["shape"][1] == 2]
    classes = [row for row in shapes if row["shape"][2] == 64]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True, sharex="col")
    styles = [
        ("voxfuse", "voxfuse", "o"),
        ("compile-comparison", "torch.compile", "s"),
        ("nnunet", "nnU-Net Dice", "^"),
        ("plain", "plain PyTorch", "v"),
        ("monai", "MONAI", "D"),
    ]
    for column, (rows, axis_of, label) in enumerate(
        (
            (volumes, lambda row: row["shape"][2], "edge of the volume, 2 classes"),
            (classes, lambda row: row["shape"][1], "classes, 64³ voxels"),
        )
    ):
        x = [axis_of(row) for row in rows]
        for name, text, marker in styles:
            if name not in rows[0]["fresh"]:
                continue
            colour = COLOURS["compiled" if name.startswith("compile") else name]
            time = [row["fresh"][name]["min_ms"] for row in rows]
            beyond = [
                max((row["peak_extra_bytes"][name] - row["gradient_bytes"]) / 2**20, 0.01)
                for row in rows
            ]
            axes[0][column].plot(x, time, marker=marker, color=colour, label=text, markersize=4)
            axes[1][column].plot(x, beyond, marker=marker, color=colour, markersize=4)
        axes[0][column].plot(
            x,
            [row["reused"]["floor"]["min_ms"] for row in rows],
            linestyle="--",
            color=COLOURS["floor"],
            label="read once + copy once",
        )
        axes[1][column].set_xlabel(label)
        for row_index in (0, 1):
            axis = axes[row_index][column]
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(x, [str(value) for value in x])
            axis.minorticks_off()
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("forward + backward, ms")
    axes[1][0].set_ylabel("memory beyond logits and gradient, MiB")
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False
    )
    _finish(figure, results, path)


def draw_step(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Bars: peak memory and time of a training step, by number of classes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    names = list(results["classes"][0]["losses"])
    colours = ["#0b6e4f", "#c8553d", "#6a4c93"]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [row["losses"][name] for row in results["classes"]]
        offset = [p + (index - (len(names) - 1) / 2) * width for p in range(len(rows))]
        memory = [row["peak_extra_bytes"] / 2**20 for row in rows]
        axes[0].bar(offset, [row["min_ms"] for row in rows], width, color=colours[index])
        axes[1].bar(offset, memory, width, label=name, color=colours[index])
    labels = [f"{row['classes']} classes" for row in results["classes"]]
    for axis, title, unit in (
        (axes[0], "Training step, MONAI UNet", "milliseconds"),
        (axes[1], "Peak memory of the step", "MiB"),
    ):
        axis.set_xticks(range(len(labels)), labels)
        axis.set_title(f"{title}, {results['patch']}³ patch")
        axis.set_ylabel(unit)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize="small")
    _save(figure, path)


def draw_fusion(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Bars: time of fusion, and of its stages; lines: peak memory over classes and depth."""
    missing = [part for part in ("time", "split", "memory") if part not in results]
    if missing:
        raise SystemExit(f"--plot: needs the parts time, split and memory, lacks {missing}")
    figure, axes = plt.subplots(2, 2, figsize=(13, 8.5), constrained_layout=True)
    _fusion_times(axes[0][0], results["time"][0])
    _fusion_stages(axes[0][1], results["split"])
    memory = results["memory"]
    edge, patch = memory["edge"], memory["patch"]
    common = f"labels out, {patch}³ patches"
    classes, depths = memory["over_classes"], memory["over_depth"]
    _fusion_memory(axes[1][0], classes, "classes")
    axes[1][0].set_title(
        f"Peak memory: {edge}x{edge}x{classes[0]['depth']},\n{common}", fontsize="medium"
    )
    _fusion_memory(axes[1][1], depths, "depth")
    axes[1][1].set_title(
        f"Peak memory: {edge}x{edge}xD, {depths[0]['classes']} classes,\n{common}",
        fontsize="medium",
    )
    axes[1][1].set_xlabel("depth D of the volume, slices")
    figure.legend(
        *axes[1][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    _finish(figure, results, path)


def _fusion_colour(name: str) -> str:
    if name.startswith("voxfuse"):
        return COLOURS["voxfuse"]
    if name.startswith("MONAI"):
        return COLOURS["monai"]
    return COLOURS["nnunet"] if name.startswith(("TorchIO", "KonfAI")) else COLOURS["floor"]


def _fusion_times(axis: Any, timed: dict[str, Any]) -> None:
    rows = [(name, row) for name, row in timed["rows"].items() if name != "copy"][::-1]
    names = [name if name != "read" else "reading the patches once" for name, _ in rows]
    values = [row["median_ms"] for _, row in rows]
    colours = [_fusion_colour(name) for name, _ in rows]
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, [f"{value:.0f}" for value in values], padding=3, fontsize="small")
    axis.set_title(
        f"Fused volume of {timed['classes']} classes, {timed['volume']}³, "
        f"{timed['patches']} patches of {timed['patch']}³",
        fontsize="medium",
    )
    axis.set_xlabel("milliseconds without the predictor, median")
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def _fusion_stages(axis: Any, split: dict[str, Any]) -> None:
    names = list(split["rows"])[::-1]
    left = [0.0] * len(names)
    stages = list(split["rows"][names[0]])
    for stage, colour in zip(stages, STAGE_COLOURS, strict=True):
        widths = [split["rows"][name][stage] for name in names]
        axis.barh(names, widths, left=left, color=colour, label=stage)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, total in enumerate(left):
        axis.annotate(
            f"{total:.0f}", (total, index), (3, 0), textcoords="offset points", va="center",
            fontsize="small",
        )  # fmt: skip
    title = f"Volume to labels, by stage: {split['classes']} classes, {split['volume']}³"
    if split["predictor_ms"] is not None:
        title += f"\n(a small UNet for as many patches: {split['predictor_ms'] / 1e3:.0f} s)"
    axis.set_title(title, fontsize="medium")
    axis.set_xlabel("milliseconds without the predictor, one call")
    axis.legend(frameon=False, fontsize="small", loc="center right")
    axis.margins(x=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def _fusion_memory(axis: Any, rows: list[dict[str, Any]], over: str) -> None:
    for name, marker, line in (
        ("voxfuse", "o", "-"),
        ("voxfuse, head", "o", ":"),
        ("MONAI", "D", "-"),
        ("MONAI, buffered", "D", ":"),
        ("TorchIO, hann", "^", "-"),
    ):
        measured = [row for row in rows if name in row["peaks"]]
        label = name + (" (a quarter as many features)" if name == "voxfuse, head" else "")
        axis.plot(
            [row[over] for row in measured],
            [row["peaks"][name] / 2**20 for row in measured],
            marker=marker,
            linestyle=line,
            markersize=4,
            color=_fusion_colour(name),
            label=label,
        )
    ticks = [row[over] for row in rows]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(over)
    axis.set_ylabel("MiB above the inputs")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_nnunet(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Bars: seconds of a case by stage; lines: peak memory over the depth of the volume."""
    missing = [part for part in ("peer", "ours", "ct", "memory") if part not in results["parts"]]
    if missing:
        raise SystemExit(f"--plot: needs the parts peer, ours, ct and memory, lacks {missing}")
    parts = results["parts"]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 3.8), width_ratios=(3, 2), constrained_layout=True
    )
    rows = [
        (f"{name}\n{_size(parts[part]['shape'])} to {_size(parts[part]['target'])}", parts[part])
        for part, name in (("ct", "voxfuse"), ("ours", "voxfuse"), ("peer", "nnU-Net"))
    ]
    starts = [0.0] * len(rows)
    for stage, colour in (
        ("network", COLOURS["plain"]),
        ("fusion", COLOURS["voxfuse"]),
        ("export", COLOURS["compiled"]),
    ):
        widths = [row["seconds"][stage] for _, row in rows]
        left.barh([name for name, _ in rows], widths, left=starts, color=colour, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for index, (total, (_, row)) in enumerate(zip(starts, rows, strict=True)):
        outside = total - row["seconds"]["network"]
        text = f"{outside:.1f} s outside the network; {row['peak_bytes'] / 2**30:.1f} GiB"
        # Inside the longest bar, beside the others.
        inside = total > 0.7 * max(starts)
        left.annotate(
            text, (total, index), (-5 if inside else 4, 0), textcoords="offset points",
            va="center", ha="right" if inside else "left", fontsize="small",
            color="black" if inside else None,
        )  # fmt: skip
    left.set_xlabel("seconds from a preprocessed image to labels, once")
    left.set_title(f"nnU-Net's prediction, {results['classes']} classes", fontsize="medium")
    left.legend(frameon=False, fontsize="small", loc="lower right")
    for kind, name, colour in (("peer", "nnU-Net", "nnunet"), ("ours", "voxfuse", "voxfuse")):
        points = [
            (row["depth"], row["peaks"][kind] / 2**20)
            for row in parts["memory"]
            if kind in row["peaks"]
        ]
        right.plot(*zip(*points, strict=True), marker="o", markersize=4, color=COLOURS[colour])
        right.annotate(
            name, points[-1], (0, 7), textcoords="offset points", ha="right", fontsize="small"
        )
    ticks = [row["depth"] for row in parts["memory"]]
    right.margins(y=0.2)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.grid(alpha=0.25)
    right.set_xlabel("depth D of the network's volume, slices")
    right.set_ylabel("MiB above the image, labels included")
    right.set_title("Peak memory: 64x64xD to 128x128x2D, tiles of 32³", fontsize="medium")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, results, path)


def _size(shape: list[int]) -> str:
    return f"{shape[0]}³" if len(set(shape)) == 1 else "x".join(map(str, shape))


def draw_head(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Bars: time by classes; lines: peak memory over the classes. Parts not measured stay empty."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    styles = [
        ("fused", "fused", "voxfuse"),
        ("unfused", "convolution + voxfuse", "nnunet"),
        ("compiled plain", "plain, compiled", "compiled"),
        ("compiled", "convolution + MONAI, compiled", "plain"),
        ("eager", "convolution + MONAI", "monai"),
    ]
    times = results.get("time", [])
    for index, (name, label, colour) in enumerate(styles):
        bars = [(x, row["losses"][name]) for x, row in enumerate(times) if name in row["losses"]]
        if not bars:
            continue
        left.bar(
            [x + (index - 2) * 0.16 for x, _ in bars],
            [bar["min_ms"] for _, bar in bars],
            0.16,
            label=label,
            color=COLOURS[colour],
        )
        rows = [
            (row["classes"], max(row["extra_bytes"][name] / 2**20, 0.01))
            for row in results.get("memory", {}).get("classes", [])
            if row["extra_bytes"].get(name) is not None
        ]
        if rows:
            right.plot(*zip(*rows, strict=True), marker="o", color=COLOURS[colour], markersize=4)
    left.set_xticks(
        range(len(times)), [f"{row['classes']} classes\n{row['edge']}³" for row in times]
    )
    right.set_xscale("log", base=2)
    for axis, title, unit in (
        (left, "Last layer + Dice-CE, forward + backward", "milliseconds"),
        (right, "Peak memory beyond inputs and gradients, by classes", "MiB"),
    ):
        axis.set_yscale("log")
        axis.set_title(title)
        axis.set_ylabel(unit)
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False
    )
    _finish(figure, results, path)


def draw_training(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Lines: the loss over the steps of a run; scores of its test subjects over the threshold."""
    (run,) = results["runs"]
    curves = run["curves"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    left.plot(*zip(*curves["loss"], strict=True), color=COLOURS["voxfuse"])
    left.set_ylim(bottom=0)
    left.set_xlabel("step")
    left.set_title("Loss, mean of ten steps", fontsize="medium")
    scores = (("Dice", "voxfuse"), ("recall", "monai"), ("precision", "nnunet"))
    for line, (subject, rows) in zip(("-", "--"), curves["thresholds"].items(), strict=True):
        thresholds, *columns = zip(*rows, strict=True)
        for (name, colour), column in zip(scores, columns, strict=True):
            label = f"{name}, {subject}"
            right.plot(thresholds, column, line, color=COLOURS[colour], label=label)
    right.set_xscale("logit")
    ticks = [0.001, 0.1, 0.5, 0.9, 0.999]
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    right.set_xlabel("threshold")
    right.set_title("Scores of the test", fontsize="medium")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(
        *right.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )
    _finish(figure, results, path)


def draw_slice(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """A slice of an image, and on it what a prediction has found, missed and made up."""
    image, masks = (
        np.frombuffer(zlib.decompress(base64.b64decode(results[name])), np.uint8)
        .reshape(results["shape"])
        .T[::-1]
        for name in ("image", "masks")
    )
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.9), constrained_layout=True)
    for axis in axes:
        axis.imshow(image, cmap="gray")
        axis.set_axis_off()
    kinds = {"found": (3, "voxfuse"), "missed": (1, "compiled"), "false": (2, "nnunet")}
    for name, (value, colour) in kinds.items():
        shown = np.ma.masked_where(masks != value, masks)
        axes[1].imshow(shown, cmap=ListedColormap([COLOURS[colour]]), interpolation="nearest")
        axes[1].plot([], [], "s", color=COLOURS[colour], label=name)
    axes[0].set_title(f"{results['subject']}, slice {results['slice']}", fontsize="medium")
    axes[1].legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, handletextpad=0
    )
    _save(figure, path)


def draw_tutorial(results: dict[str, Any], path: Path | io.BytesIO) -> None:
    """Lines: two losses' trainings over the steps; bars: memory of a step and of its loss."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), constrained_layout=True)
    names = {"monai": "MONAI", "voxfuse": "voxfuse"}
    for (key, name), (width, line) in zip(names.items(), ((5, "-"), (2, "--")), strict=True):
        curve = results["curves"][key]
        epochs = [sum(curve[k : k + 4]) / 4 for k in range(0, len(curve), 4)]
        steps = [4 * (k + 1) for k in range(len(epochs))]
        left.plot(steps, epochs, line, color=COLOURS[key], linewidth=width, label=name)
    left.set_xlabel("step")
    left.set_title("DiceCELoss, mean over the four patches", fontsize="medium")
    left.legend(frameon=False)
    rows = results["memory"]
    bars = [(key, what) for what in ("step_bytes", "loss_bytes") for key in names]
    for index, (key, what) in enumerate(bars):
        drawn = right.bar(
            [place + (index - 1.5) * 0.2 for place in range(len(rows))],
            [row[what][key] / 2**20 for row in rows],
            0.2,
            color=COLOURS[key],
            alpha=1 if what == "step_bytes" else 0.55,
            label=f"{names[key]}, {'whole step' if what == 'step_bytes' else 'loss alone'}",
        )
        right.bar_label(drawn, fmt="%.0f", padding=2, fontsize="small")
    right.set_xticks(range(len(rows)), [f"{row['edge']}³" for row in rows])
    right.set_xlabel("patch")
    right.set_ylabel("MiB")
    right.set_title("Memory: step; loss beside logits and gradient", fontsize="medium")
    right.legend(frameon=False, loc="upper left")
    right.margins(y=0.12)
    for axis in (left, right):
        axis.grid(axis="y", alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _finish(figure, results, path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
