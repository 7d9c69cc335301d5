"""Patch fusion in gather form: every voxel sums the few patches over it, in patch order.

A program owns a tile of one slice of the volume (or ring) for a few channels. It looks for the
patches that touch its tile, a block of origins at a time, and adds them one after the other in
registers; then every voxel of the tile is written once. The weights of a patch are formed once
for all channels of the program. No atomics, so that the bits do not depend on anything but the
patches and their order.

The softmax of a patch needs the greatest value and the sum over the channels of each of its voxels.
Up to FEW channels a program works them out whenever it adds a patch, from what the caches hold of
it; with more they are two numbers a voxel, which a launch before works out.
"""

from voxfuse.triton_kernels.overlap_add.launch import (
    overlap_add,
    overlap_add_,
    overlap_add_backward,
    overlap_weights_,
)

__all__ = ["overlap_add", "overlap_add_", "overlap_add_backward", "overlap_weights_"]
