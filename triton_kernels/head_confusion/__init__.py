"""Soft confusion of a linear head: logits live in registers, a tile of voxels at a time.

A *tile* is BLOCK voxels. Its logits are one product of the weight (CLASSES, K) and the features
(K, BLOCK), both padded to powers of two, accumulated in float32; they are reduced, or turned into
their gradient, where they are. Nothing volume-sized is written but the features' gradient.

Reduction. A *chunk* is a fixed number of consecutive tiles, summed in float32; a program takes
every slots-th chunk and adds it in float64 to a partial sum of its own. Which program adds what
depends on the shape alone, and the partial sums are added in a fixed order, forward by the programs
that come last (see reduction): the same bits in every run.

Larger heads (see launch.in_registers) and float64 go through memory chunk by chunk: the platform's
matrix product and the soft confusion kernels.
"""

from voxfuse.triton_kernels.head_confusion.launch import head_confusion, head_confusion_backward

__all__ = ["head_confusion", "head_confusion_backward"]
