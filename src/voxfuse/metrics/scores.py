"""Scores of labels and masks over many samples, from counts that are made in one pass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from voxfuse._backends import check_name
from voxfuse._ranks import Gathering, ranks_of
from voxfuse.metrics.definitions import METRICS
from voxfuse.metrics.voxelwise import VoxelCounts, check_beta, fraction
from voxfuse.ops import _checks
from voxfuse.ops.hard_confusion import check_options, hard_confusion

#: What is left of a class where neither truth nor prediction has it is a choice, not a formula.
_CHOSEN_IF_ABSENT = ("dice", "jaccard", "f_beta", "sensitivity", "precision")
_FORMULAS = (*_CHOSEN_IF_ABSENT, "specificity", "npv", "relative_volume_difference", "mcc")
_REDUCTIONS = ("none", "class", "sample", "mean")


class SegmentationScores:
    r"""Dice and its kin of a validation, without argmax, one-hot or masks in memory.

    :meth:`update` counts a batch by :func:`voxfuse.hard_confusion`, on the device and without
    waiting for it; :meth:`compute` makes the scores of all counts: Dice, Jaccard, F-beta,
    sensitivity, specificity, precision (PPV), NPV, the relative volume difference and Matthews'
    correlation coefficient, by the formulas of :data:`voxfuse.metrics.METRICS`. ``print`` shows
    them as a table.

    With these options the Dice is another library's:

    ================================================  ============================================
    as                                                options, and what to look at
    ================================================  ============================================
    MONAI's ``DiceMetric``, ``reduction="mean"``      ``false_alarm="ignore"``, ``compute("mean")``
    ... ``"mean_batch"``                              the same, ``compute("class")``
    ... ``ignore_empty=False``                        ``absent=1.0``
    nnU-Net's pseudo Dice                             ``pooled=True, include_background=False``,
                                                      ``compute("class")``, ``compute("mean")``
    torchmetrics' ``DiceScore``, ``average="macro"``  ``compute("mean")``; ``average="none"``:
                                                      ``compute("class")``
    ... ``aggregation_level="global"``                ``pooled=True``
    ================================================  ============================================

    One thing differs: what has no score in any sample, a class of ``compute("class")`` or the whole
    ``compute("mean")``, is NaN here and 0 in MONAI.

    Args:
        mode, activation, threshold, num_classes, ignore_index: what is a prediction, and which
            voxels count: see :func:`voxfuse.hard_confusion`.
        include_background: whether class 0 has scores.
        pooled: count all samples as one volume; else every sample has scores of its own.
        absent: the Dice, Jaccard, F-beta, sensitivity and precision of a class that neither the
            truth nor the prediction of a sample has: "ignore" leaves it out of every mean (NaN), a
            number counts.
        false_alarm: those of a class that is predicted where the truth has none of it: "score", by
            the formula (Dice 0), or "ignore".
        beta: of F-beta; above 1 asks for sensitivity.
        names: of the classes, for the table.
        process_group: None, "world" or a process group, over whose ranks :meth:`compute` adds up
            the counts or collects the samples.
        backend: see :func:`voxfuse.backends`.

    Raises:
        TypeError, ValueError: an option is not allowed.

    Example:
        >>> import torch
        >>> from voxfuse.metrics import SegmentationScores
        >>> scores = SegmentationScores()
        >>> logits = torch.tensor([[[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]])  # 2 classes, 3 voxels
        >>> _ = scores.update(logits, torch.tensor([[0, 1, 0]]))
        >>> scores.compute()["dice"]  # of every class
        tensor([0.6667, 0.6667], dtype=torch.float64)
        >>> scores.compute("mean")["jaccard"]
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(
        self,
        mode: str = "argmax",
        *,
        activation: str | None = None,
        threshold: float | None = None,
        num_classes: int | None = None,
        ignore_index: int | None = None,
        include_background: bool = True,
        pooled: bool = False,
        absent: Literal["ignore"] | float = "ignore",
        false_alarm: Literal["score", "ignore"] = "score",
        beta: float = 2.0,
        names: Sequence[str] | None = None,
        process_group: Any = None,
        backend: str = "auto",
    ) -> None:
        if absent != "ignore" and (isinstance(absent, (str, bool)) or not math.isfinite(absent)):
            raise ValueError(f"absent: got {absent!r}, expected 'ignore' or a number")
        if false_alarm not in ("score", "ignore"):
            raise ValueError(f"false_alarm: got {false_alarm!r}, expected 'score' or 'ignore'")
        check_beta(beta)
        check_options(mode, activation, threshold, num_classes)
        check_name(backend)
        self.options: dict[str, Any] = {
            "mode": mode,
            "activation": activation,
            "threshold": threshold,
            "num_classes": num_classes,
            "ignore_index": _checks.ignored_label(ignore_index),
            "backend": backend,
        }
        self.include_background = include_background
        self.pooled = pooled
        self.absent = absent
        self.false_alarm = false_alarm
        self.beta = beta
        self.names = None if names is None else list(names)
        self.process_group = process_group
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Count a batch; return its counts (B, C, 4): TP, FP, FN, TN.

        Args:
            input, target, mask: see :func:`voxfuse.hard_confusion`.
        """
        counts = hard_confusion(input, target, mask=mask, **self.options)
        self._check_classes(counts.shape[1])
        kept = counts.sum(0, keepdim=True) if self.pooled else counts.clone()
        if self.pooled and self._counts:
            self._counts = [self._counts[0] + kept]
        else:
            self._counts.append(kept)
        return counts

    def _check_classes(self, classes: int) -> None:
        if self._counts and self._counts[0].shape[1] != classes:
            raise ValueError(
                f"input: has {classes} classes, but what was counted before has "
                f"{self._counts[0].shape[1]}"
            )
        if not self.include_background and classes == 1:
            raise ValueError(
                "include_background: got False, but the only class of input is the foreground"
            )
        if self.names is not None and len(self.names) != classes:
            raise ValueError(f"names: got {len(self.names)} names, but input has {classes} classes")

    def reset(self) -> None:
        """Forget everything that was counted."""
        self._counts = []

    @property
    def counts(self) -> Tensor:
        """(N, C, 4) int64 of this process's N samples, or of all of them, (1, C, 4), if pooled."""
        if self._counts:
            self._counts = [torch.cat(self._counts)]
            return self._counts[0].clone()
        classes = self.options["num_classes"]
        if classes is None:
            raise RuntimeError(
                "compute: nothing was counted; call update first, or say num_classes where a "
                "process may have no sample"
            )
        return torch.zeros(int(self.pooled), classes, 4, dtype=torch.int64)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, and whether they are pooled, to go on with later or elsewhere."""
        if not self._counts:
            return {}
        return {"counts": self.counts, "pooled": torch.tensor(self.pooled)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the place of what was counted by a :meth:`state_dict`.

        Raises:
            ValueError: it does not hold counts, or those of samples where they are pooled here, or
                their sum where they are not.
        """
        self.reset()
        if not state:
            return
        counts = state.get("counts")
        if counts is None or counts.ndim != 3 or counts.shape[-1] != 4:
            raise ValueError(f"state: got {sorted(state)}, expected counts (N, C, 4)")
        if not self.pooled and bool(state.get("pooled", False)):
            raise ValueError("state: got the sum of all samples, but pooled=False keeps each")
        if self.pooled and counts.shape[0] != 1:
            raise ValueError(
                f"state: got counts of {counts.shape[0]} samples, but pooled=True keeps their sum"
            )
        if counts.dtype != torch.int64 or bool((counts < 0).any()):
            raise ValueError(f"state: got counts in {counts.dtype}, expected int64 >= 0")
        self._check_classes(counts.shape[1])
        self._counts = [counts.clone()]

    def compute(self, reduction: str = "class") -> dict[str, Tensor]:
        """Every score by its name, float64; undefined ones are NaN and in no mean.

        Args:
            reduction: "none": (N, C), every sample and class; "class": (C,), the mean over samples;
                "sample": (N,), the mean over classes; "mean": the mean over samples of the means
                over classes. C is less the background, if it is not included.

        Raises:
            ValueError: no such reduction.
            RuntimeError: nothing was counted.
        """
        if reduction not in _REDUCTIONS:
            listed = ", ".join(map(repr, _REDUCTIONS))
            raise ValueError(f"reduction: got {reduction!r}, expected one of {listed}")
        scores = self._scores(self._of_all_ranks())
        if reduction == "none":
            return scores
        if reduction == "class":
            return {name: score.nanmean(0) for name, score in scores.items()}
        means = {name: score.nanmean(1) for name, score in scores.items()}
        if reduction == "sample":
            return means
        return {name: mean.nanmean() for name, mean in means.items()}

    def _of_all_ranks(self) -> Tensor:
        counts = self.counts
        ranks = ranks_of(self.process_group, False)
        if ranks is None:
            return counts
        if self.pooled:
            import torch.distributed

            torch.distributed.all_reduce(counts, group=ranks.group)
            return counts
        rows = counts.flatten(1).T
        gathering = Gathering(rows.shape[0], rows.shape[1], rows.device, ranks)
        collected: Tensor = gathering(rows).T.unflatten(1, counts.shape[1:])
        return collected

    def _scores(self, counts: Tensor) -> dict[str, Tensor]:
        if not self.include_background:
            counts = counts[:, 1:]
        columns: Any = counts.to(torch.float64).unbind(-1)
        numbers = VoxelCounts(*columns)
        no_truth = torch.as_tensor(numbers.truth == 0)
        nothing = no_truth & torch.as_tensor(numbers.prediction == 0)
        absent = math.nan if self.absent == "ignore" else float(self.absent)
        scores = {}
        for name in _FORMULAS:
            formula, beta = ("dice", self.beta) if name == "f_beta" else (name, 1.0)
            numerator, denominator = fraction(formula, numbers, beta)
            score = numerator / denominator  # 0/0 is NaN
            if name == "relative_volume_difference":
                score = score.masked_fill(no_truth, math.nan)  # not infinite
            if name in _CHOSEN_IF_ABSENT:
                if self.false_alarm == "ignore":
                    score = score.masked_fill(no_truth, math.nan)
                score = score.masked_fill(nothing, absent)
            scores[f"f{self.beta:g}" if name == "f_beta" else name] = score
        return scores

    def __repr__(self) -> str:
        """The options that are not the defaults."""
        defaults = inspect.signature(SegmentationScores).parameters
        own = ("include_background", "pooled", "absent", "false_alarm", "beta", "names")
        given = self.options | {name: getattr(self, name) for name in own}
        shown = [f"{k}={v!r}" for k, v in given.items() if v != defaults[k].default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __str__(self) -> str:
        """A table: a row a class, and their mean."""
        if not self._counts and self.options["num_classes"] is None:
            return f"{self!r}: nothing was counted yet"
        scores = self.compute("none")
        samples, classes = scores["dice"].shape
        first = int(not self.include_background)
        names = self.names or [str(c) for c in range(first + classes)]
        titles = [_title(name) for name in scores]
        rows = [["class", *titles, "of"]]
        mean = {name: score.nanmean(0) for name, score in scores.items()}
        counted = (~scores["dice"].isnan()).sum(0).tolist()
        for c in range(classes):
            values = [_shown(float(mean[name][c])) for name in scores]
            rows.append([names[first + c], *values, f"{counted[c]}/{samples}"])
        overall = [_shown(float(score.nanmean(1).nanmean())) for score in scores.values()]
        rows.append(["mean", *overall, ""])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            first_cell, *others = (f"{x:>{w}}" for x, w in zip(row, widths, strict=True))
            lines.append("  ".join([f"{row[0]:<{len(first_cell)}}", *others]).rstrip())
        return "\n".join(lines)


def _title(name: str) -> str:
    short = {"relative_volume_difference": "dV/V", "precision": "PPV"}
    known = METRICS.get(name)
    return short.get(name) or (known.title if known else name.upper())


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
