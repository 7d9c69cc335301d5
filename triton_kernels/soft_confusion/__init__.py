"""Soft confusion sums and their gradient, fused.

Layout of the work. A *tile* is BLOCK voxels of all classes, held in registers as a tuple of
TILES blocks of (CLASSES, BLOCK) numbers: up to 16 classes one block a class (no padding, no
exchange between threads), up to 256 classes in blocks of one class a warp. Beyond that the
*online* kernels walk over the class blocks and read the logits again (from the cache) instead of
keeping them.

Reduction. A *chunk* is a fixed number of consecutive tiles; it is summed in float32 (float64 for
float64 logits). A program adds its chunks in float64, in order, and writes one row of partial sums;
the programs that come last add up the rows, in an order that does not depend on which they are (see
reduction). All of it is fixed by the shape alone, so the bits depend neither on the number of
multiprocessors nor on their timing.

Modules: ``options`` (what a launch depends on), ``load`` (reading a tile), ``probability``
(softmax, likelihoods and their slopes), ``forward``, ``backward`` and ``launch``.
"""

from voxfuse.triton_kernels.soft_confusion.launch import soft_confusion, soft_confusion_backward

__all__ = ["soft_confusion", "soft_confusion_backward"]
