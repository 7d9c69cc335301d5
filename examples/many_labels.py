"""117 classes at twice the resolution of a head, fused in a ring: labels out, no (C, V) volume.

The map of 116 brain regions (data/head_mr/aal.nii.gz) stands for what a network would predict:
noisy one-hot patches of the map at twice its resolution, 362 x 434 x 362 voxels. A sliding window
that keeps all classes of the volume needs 26.6 GB for its sums alone. Here a ring of slices does,
and with the last linear layer as ``head=`` a ring of 32 features.

    python examples/many_labels.py                  # 362 x 434 x 362; a few minutes
    python examples/many_labels.py --quick          # a part of it; seconds
    python examples/many_labels.py --limit-gib 8    # in a process that may not use more

With ``--limit-gib`` the system refuses the process any more address space. MONAI's call, if MONAI
is installed, is then made as well, on the same volume and patches: the script prints what comes of
it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from measure import peak_memory
from torch import Tensor

import voxfuse

ROOT = Path(__file__).resolve().parent.parent
CLASSES, FEATURES, OVERLAP = 117, 32, 0.25


def read_regions() -> Tensor:
    """The map with labels 0 to 116 in place of the atlas's own numbers."""
    image = nibabel.load(ROOT / "data" / "head_mr" / "aal.nii.gz")
    values = np.asarray(image.dataobj).astype(np.int64)
    _, labels = np.unique(values, return_inverse=True)
    return torch.from_numpy(labels.reshape(values.shape))


def finer(regions: Tensor) -> Tensor:
    """The map at twice the resolution, uint8."""
    fine = regions.to(torch.uint8)
    for axis in range(3):
        fine = fine.repeat_interleave(2, axis)
    return fine


def fuse(
    truth: Tensor,
    patch: int,
    channels: int,
    predict: Callable[[Tensor], Tensor],
    head: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Predict and fuse patch by patch, print and return what it took."""
    fuser = voxfuse.PatchFuser(
        truth.shape, (patch,) * 3, channels, overlap=OVERLAP, output="labels", head=head
    )
    print(fuser.plan())
    started = time.perf_counter()
    fusing = 0.0
    with peak_memory(torch.device("cpu")) as peak:
        for origins in fuser.batches(1):
            x, y, z = origins[0].tolist()
            labels = truth[x : x + patch, y : y + patch, z : z + patch]
            prediction = predict(labels.long())
            begun = time.perf_counter()
            fuser.add(prediction[None], origins)
            fusing += time.perf_counter() - begun
        result = fuser.result()
    seconds = time.perf_counter() - started
    agree = int((result == truth).sum()) / truth.numel()
    dense = 4 * CLASSES * truth.numel()
    print(
        f"  {seconds:.1f} s, of which fusion {fusing:.1f} s; peak above the inputs "
        f"{(peak.extra_bytes or 0) / 1e9:.2f} GB measured; the sums of all classes of the volume "
        f"alone would be {dense / 1e9:.1f} GB; {agree:.2%} of the voxels as in the map"
    )
    return {
        "channels": channels,
        "seconds": seconds,
        "fusion_seconds": fusing,
        "peak_bytes": peak.extra_bytes,
        "ring_bytes": fuser.plan().ring_bytes,
        "dense_bytes": dense,
        "agree": agree,
    }


def try_monai(shape: torch.Size, patch: int, predict: Callable[[Tensor], Tensor]) -> str:
    """Make MONAI's call for the same patches; what came of it."""
    if importlib.util.find_spec("monai") is None:
        return "not installed"
    from monai.inferers import sliding_window_inference

    no_labels = torch.zeros((patch,) * 3, dtype=torch.int64)
    # The values of the volume play no part: one voxel, expanded, takes no memory.
    volume = torch.zeros(1, 1, 1, 1, 1).expand(1, 1, *shape)
    try:
        sliding_window_inference(
            volume, (patch,) * 3, 1, lambda _: predict(no_labels)[None], OVERLAP, mode="gaussian"
        )
    except (RuntimeError, MemoryError) as error:
        return str(error).strip().splitlines()[0]
    return "ran"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of the head, small patches")
    parser.add_argument("--limit-gib", type=float, help="address space that the process may use")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    if options.limit_gib:
        limit = int(options.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(f"Limit of the address space (RLIMIT_AS): {options.limit_gib:g} GiB")
    torch.manual_seed(0)
    regions, patch = read_regions(), 96
    if options.quick:
        regions, patch = regions[60:90, 80:110, 60:90].contiguous(), 24
    truth = finer(regions)

    noise = 0.2 * torch.randn(CLASSES, patch, patch, patch)

    # One tensor for all predictions, as a network's own allocator would reuse it.
    prediction = torch.empty_like(noise)
    ones = torch.ones_like(noise[:1])

    def one_hot(labels: Tensor) -> Tensor:
        return prediction.copy_(noise).scatter_add_(0, labels[None], ones)

    print(f"\n{CLASSES} classes")
    plain = fuse(truth, patch, CLASSES, one_hot, None)

    # Features: a code of 32 numbers a class; the head compares with every class's code.
    codes = torch.nn.functional.normalize(torch.randn(CLASSES, FEATURES), dim=1)
    some_noise = 0.1 * noise[:FEATURES]
    columns, some = codes.T.contiguous(), prediction[:FEATURES]

    def features(labels: Tensor) -> Tensor:
        torch.index_select(columns, 1, labels.flatten(), out=some.view(FEATURES, -1))
        return some.add_(some_noise)

    print(f"\n{FEATURES} features and a head of {CLASSES} classes")
    from_features = fuse(truth, patch, FEATURES, features, (codes, torch.zeros(CLASSES)))

    monai = None
    if options.limit_gib:
        monai = try_monai(truth.shape, patch, one_hot)
        print(f"\nMONAI's sliding_window_inference in the same process: {monai}")
    if options.json:
        record = {
            "torch": str(torch.__version__),
            "voxfuse": voxfuse.__version__,
            "threads": torch.get_num_threads(),
            "shape": list(truth.shape),
            "patch": patch,
            "overlap": OVERLAP,
            "classes": CLASSES,
            "limit_gib": options.limit_gib,
            "plain": plain,
            "features": from_features,
            "monai_in_the_same_process": monai,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"\nfigures: {options.json}")


if __name__ == "__main__":
    main()
