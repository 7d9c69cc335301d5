"""The losses as functions: :mod:`voxfuse.losses.functional` under its public name."""

from voxfuse.losses.functional import *  # noqa: F403
from voxfuse.losses.functional import __all__  # noqa: F401
