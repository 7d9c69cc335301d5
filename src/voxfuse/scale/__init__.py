"""Volumes larger than memory: where they are read from, where results go, box by box.

Any number of processes does the boxes, with the bits of one. Needs the extra ``voxfuse[zarr]`` for
what is stored as Zarr.
"""

from voxfuse.fusion.arrays import Assignable, Sliceable
from voxfuse.scale.boxes import Plan, plan_boxes
from voxfuse.scale.destinations import ZarrDestination, create_destination, open_destination
from voxfuse.scale.job import Job
from voxfuse.scale.manifest import ManifestError
from voxfuse.scale.ome_zarr import Space
from voxfuse.scale.pyramid import build_pyramid
from voxfuse.scale.sources import Source, open_source
from voxfuse.scale.stores import DamagedError

__all__ = [
    "Assignable",
    "DamagedError",
    "Job",
    "ManifestError",
    "Plan",
    "Sliceable",
    "Source",
    "Space",
    "ZarrDestination",
    "build_pyramid",
    "create_destination",
    "open_destination",
    "open_source",
    "plan_boxes",
]
