"""117 classes at twice the resolution of a head, fused in a ring: labels out, no (C, V) volume.

The map of 116 brain regions (data/head_mr/aal.nii.gz) stands for what a network would predict:
noisy one-hot patches of the map at twice its resolution, 362 x 434 x 362 voxels. A sliding window
that keeps all classes of the volume needs 26.6 GB for its sums alone. Here a ring of slices does,
and with the last linear layer as ``head=`` a ring of 32 features.

    python examples/many_labels.py           # 362 x 434 x 362; minutes
    python examples/many_labels.py --quick   # a part of it; seconds
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor

import voxfuse

ROOT = Path(__file__).resolve().parent.parent
CLASSES, FEATURES = 117, 32


def read_regions() -> Tensor:
    """The map with labels 0 to 116 in place of the atlas's own numbers."""
    image = nibabel.load(ROOT / "data" / "head_mr" / "aal.nii.gz")
    values = np.asarray(image.dataobj).astype(np.int64)
    _, labels = np.unique(values, return_inverse=True)
    return torch.from_numpy(labels.reshape(values.shape))


def peak_bytes() -> int:
    """High-water mark of the resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def reset_peak() -> int:
    """Forget the high-water mark; return what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def fuse(
    regions: Tensor,
    patch: int,
    channels: int,
    predict: Callable[[Tensor], Tensor],
    head: tuple[Tensor, Tensor] | None,
) -> None:
    shape = tuple(2 * size for size in regions.shape)
    fuser = voxfuse.PatchFuser(
        shape, (patch,) * 3, channels, overlap=0.25, output="labels", head=head
    )
    print(fuser.plan())
    everything = 4 * CLASSES * int(np.prod(shape)) / 1e9
    before = reset_peak()
    started = time.perf_counter()
    fusing = 0.0
    for origins in fuser.batches(1):
        x, y, z = origins[0].tolist()
        # Twice the resolution: voxel i of the fine map is voxel i // 2 of the coarse one.
        fine = [torch.arange(start, start + patch) // 2 for start in (x, y, z)]
        labels = regions[fine[0]][:, fine[1]][:, :, fine[2]]
        prediction = predict(labels)
        begun = time.perf_counter()
        fuser.add(prediction[None], origins)
        fusing += time.perf_counter() - begun
    result = fuser.result()
    seconds = time.perf_counter() - started
    truth = regions.repeat_interleave(2, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    agree = float((result.long() == truth).float().mean())
    print(
        f"  {seconds:.1f} s, of which fusion {fusing:.1f} s; peak above the inputs "
        f"{(peak_bytes() - before) / 2**20:.0f} MiB measured (all classes of the volume: "
        f"{everything:.1f} GB); {agree:.2%} of the voxels as in the map"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of the head, small patches")
    options = parser.parse_args()
    torch.manual_seed(0)
    regions, patch = read_regions(), 96
    if options.quick:
        regions, patch = regions[60:90, 80:110, 60:90].contiguous(), 24

    noise = 0.2 * torch.randn(CLASSES, patch, patch, patch)

    def one_hot(labels: Tensor) -> Tensor:
        return noise.clone().scatter_add_(0, labels[None], torch.ones_like(noise[:1]))

    print(f"\n{CLASSES} classes")
    fuse(regions, patch, CLASSES, one_hot, None)

    # Features: a code of 32 numbers a class; the head compares with every class's code.
    codes = torch.nn.functional.normalize(torch.randn(CLASSES, FEATURES), dim=1)
    some_noise = 0.1 * noise[:FEATURES]

    def features(labels: Tensor) -> Tensor:
        return codes[labels].movedim(-1, 0) + some_noise

    print(f"\n{FEATURES} features and a head of {CLASSES} classes")
    fuse(regions, patch, FEATURES, features, (codes, torch.zeros(CLASSES)))


if __name__ == "__main__":
    main()
