"""Finalisation of a ring's slices on a GPU: the PyTorch reference, slab by slab.

There is no Triton kernel of this operator yet. The reference reads one slab of a ring, so that what
it allocates does not grow with the volume.
"""

from voxfuse.reference.finalize_slab import finalize_slab

__all__ = ["finalize_slab"]
