"""What is said of a claim."""

from __future__ import annotations

from voxfuse.experiments.statistics import FewPatients

SHOWN, ONLY, NOT = "shown", "only at 0.5", "not shown"
FEW, WAITING = "too few patients to say", "not complete yet"


def of_few(tuned: FewPatients, at_half: FewPatients) -> str:
    """Of intervals over few patients, at tuned thresholds and at 0.5."""
    if tuned.sign > 0:
        return SHOWN
    if at_half.sign > 0:
        return ONLY
    return NOT if tuned.sign < 0 else FEW
