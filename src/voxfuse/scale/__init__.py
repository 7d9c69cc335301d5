"""Volumes larger than memory: where they are read from, and where results go.

Needs the extra ``voxfuse[zarr]`` for what is stored as Zarr.
"""

from voxfuse.scale.destinations import ZarrDestination, create_destination, open_destination
from voxfuse.scale.ome_zarr import Space
from voxfuse.scale.pyramid import build_pyramid
from voxfuse.scale.sources import Source, open_source
from voxfuse.scale.stores import DamagedError

__all__ = [
    "DamagedError",
    "Source",
    "Space",
    "ZarrDestination",
    "build_pyramid",
    "create_destination",
    "open_destination",
    "open_source",
]
