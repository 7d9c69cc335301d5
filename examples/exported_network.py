"""An exported network, without its Python code, as the predictor of the sliding window.

    python examples/exported_network.py [--patch 72]

Exports the bundled brain extraction network with torch.export, and to ONNX where the packages
onnxscript and onnxruntime are installed; loads each file and fuses its predictions of the bundled
head. All that a predictor must do is to take a batch of patches and return one. Needs the extra
"demo" (nibabel).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import head_image
import torch
from skull_strip_unet import load_skull_strip_unet
from torch import Tensor, nn

import voxfuse

DATA = Path(__file__).resolve().parents[1] / "data"
BATCH = 2
Predictor = Callable[[Tensor], Tensor]


def with_torch_export(network: nn.Module, patches: Tensor, file: Path) -> Predictor:
    """Through a file of torch.export's. Any batch, as the last one of a volume is smaller."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(network, (patches,), dynamic_shapes=({0: batch},))
    torch.export.save(program, file)
    return torch.export.load(file).module()  # a file that you trust: SECURITY.md


def with_onnx_runtime(network: nn.Module, patches: Tensor, file: Path) -> Predictor:
    """Through a file of ONNX and ONNX Runtime."""
    import onnxruntime

    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        network, (patches,), file, dynamic_shapes=({0: batch},), external_data=False, verbose=False
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(batch: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: batch.numpy()})
        return torch.from_numpy(logits)

    return predict


def main(arguments: Sequence[str] | None = None) -> int:
    """Export, load, fuse; fail where a segmentation differs from that of the network itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patch", type=int, default=72, help="divisible by 8 (default 72)")
    options = parser.parse_args(arguments)
    grid = head_image.read_head(
        DATA / "head_mr/ch2.nii.gz", DATA / "head_mr/ch2bet.nii.gz", clip=False
    ).training()
    network = load_skull_strip_unet(DATA / "skull_strip_unet" / "weights.npz")
    patches = torch.zeros(BATCH, 1, *(options.patch,) * 3)

    def brain(predictor: Predictor) -> Tensor:
        logits = voxfuse.sliding_window_inference(
            grid.image[None, None], patches.shape[2:], BATCH, predictor, overlap=0.2
        )
        return logits[0, 0] > 0

    expected = brain(network)
    ways = {"torch.export": with_torch_export}
    missing = [x for x in ("onnxscript", "onnxruntime") if importlib.util.find_spec(x) is None]
    if missing:
        print(f"ONNX is left out: pip install {' '.join(missing)}")
    else:
        ways["ONNX Runtime"] = with_onnx_runtime
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, export in ways.items():
            file = Path(folder) / f"network{'.pt2' if name == 'torch.export' else '.onnx'}"
            found = brain(export(network, patches, file))
            differing = (found != expected).double().mean().item()
            worst = max(worst, differing)
            print(
                f"{name}: {file.stat().st_size / 1e6:.1f} MB; {found.sum()} voxels of brain, "
                f"{differing:.5%} of the voxels unlike the network's own"
            )
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
