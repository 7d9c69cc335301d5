"""What a job on a large volume is, on disk: a manifest, and a marker for every finished box."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxfuse._files import make_folder, sha256_of, write_text
from voxfuse.fusion.region import Box

#: What this version reads and writes.
FORMAT = "voxfuse boxes 1"
MANIFEST = "manifest.json"

#: Voxels along each axis of a sample of a volume.
_SAMPLE = 8
_AGAIN = "remove it, and prepare the job again: boxes that are done stay done"


class ManifestError(ValueError):
    """A job's folder does not go with what is asked for, or is damaged."""


def digest(content: Any) -> str:
    """SHA-256 of what JSON makes of something."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digest_of(array: Any) -> str:
    """SHA-256 of an array's shape, dtype and values."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        kind = str(array.dtype)
        flat = array.contiguous().reshape(-1)
        values = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    else:
        values = np.ascontiguousarray(array)
        kind = str(values.dtype)
    described = hashlib.sha256(f"{kind} {tuple(array.shape)} ".encode())
    described.update(values.reshape(-1).view(np.uint8).data)
    return described.hexdigest()


def fingerprint_of(volume: Any, *described: Any) -> str:
    """What tells a volume from another: shape, dtype, and samples of the values from all over it.

    It does not depend on where the volume lies, and it is no proof.

    Args:
        volume: what can be sliced.
        described: what it is besides.
    """
    shape = tuple(int(size) for size in volume.shape)
    corners = [sorted({0, n // 3, 2 * n // 3, n - _SAMPLE}) if n > _SAMPLE else [0] for n in shape]
    samples = []
    for corner in itertools.islice(itertools.product(*corners), None, None, 5):
        key = tuple(slice(low, min(low + _SAMPLE, n)) for low, n in zip(corner, shape, strict=True))
        samples.append(digest_of(np.asarray(volume[key])))
    return digest([shape, str(np.dtype(volume.dtype)), *described, samples])


def digest_of_model(model: Any) -> str:
    """SHA-256 of a file, of a module's state, or a text as it is.

    Raises:
        FileNotFoundError: a path is not that of a file.
        TypeError: the model is none of these.
    """
    if isinstance(model, nn.Module):
        state = sorted(model.state_dict().items())
        return digest({name: _digest_of_state(each) for name, each in state})
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"models: got {type(model).__name__}, expected a module, a path of a file or a text"
        )
    if not os.path.isfile(model):
        if isinstance(model, os.PathLike) or os.path.isdir(model):
            raise FileNotFoundError(errno.ENOENT, "models: there is no such file", str(model))
        return model
    return sha256_of(model)


def _digest_of_state(value: Any) -> Any:
    """Of extra state and quantised layers the parts, where they are no tensors."""
    if isinstance(value, (Tensor, np.ndarray)):
        return digest_of(value)
    if isinstance(value, Mapping):
        return {str(key): _digest_of_state(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_digest_of_state(each) for each in value]
    return repr(value)


def plain(value: Any) -> Any:
    """A JSON value that two equal options share; arrays are digests."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{tuple(value.shape)} {value.dtype} sha256:{digest_of(value)}"
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, Sequence):
        return [plain(each) for each in value]
    return str(value)


def packed(kept: NDArray[np.bool_] | None) -> str | None:
    """Which patches are predicted, as text."""
    if kept is None:
        return None
    return base64.b64encode(zlib.compress(np.packbits(kept).tobytes(), 9)).decode()


def unpacked(text: str | None, count: int) -> NDArray[np.bool_] | None:
    """The same back."""
    if text is None:
        return None
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)
    return np.unpackbits(bits, count=count).astype(bool)


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """What differs between two descriptions, by its name."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            inner = f"{name}.{key}" if name else str(key)
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name}: was {_short(before)}, is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ... ({len(text)} characters)"


class Folder:
    """A job's folder: ``manifest.json``, and a marker in ``done/`` for every finished box."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def read(self) -> dict[str, Any] | None:
        """The manifest, None if there is none.

        Raises:
            ManifestError: it is damaged, or of another version.
        """
        path = self.path / MANIFEST
        try:
            content: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ManifestError(f"{path}: is no manifest ({error}); {_AGAIN}") from None
        sealed = isinstance(content, dict) and content.pop("sha256", None) == digest(content)
        if not sealed:
            raise ManifestError(f"{path}: was changed or cut off; {_AGAIN}")
        if content.get("format") != FORMAT:
            raise ManifestError(f"{path}: is {content.get('format')!r}, expected {FORMAT!r}")
        return content

    def write(self, content: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, sealed by its digest, if there is none; returns the one that is."""
        text = json.dumps({**content, "sha256": digest(content)}, indent=1)
        make_folder(self.path)
        try:
            write_text(self.path / MANIFEST, text, exclusive=True)
        except FileExistsError:
            return self.read() or content
        return content

    def marker(self, index: int) -> Path:
        """The file that says that a box is finished."""
        return self.path / "done" / f"{index:06d}.json"

    def mark(self, index: int, box: Box, manifest: str, sample: Any) -> None:
        """Say that a box is finished, after its voxels are on the disk, with a sample of them."""
        content = {**_marked(index, box, manifest), "sample": sample}
        path = self.marker(index)
        make_folder(path.parent)
        write_text(path, json.dumps({**content, "sha256": digest(content)}))

    def marked(self, index: int, box: Box, manifest: str) -> dict[str, Any] | None:
        """What the marker of a finished box says; None: there is none.

        Raises:
            ManifestError: its marker is damaged, or of another job.
        """
        path = self.marker(index)
        try:
            content = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.pop("sha256", None) != digest(content):
            raise ManifestError(f"{path}: is damaged; remove it, and the box is done again")
        sample, expected = content.pop("sample", None), _marked(index, box, manifest)
        if content != expected:
            changes = "; ".join(differences(content, expected))
            raise ManifestError(f"{path}: is of another job ({changes}); take another folder")
        return {**content, "sample": sample}


def _marked(index: int, box: Box, manifest: str) -> dict[str, Any]:
    return {"box": index, "low": list(box.low), "high": list(box.high), "manifest": manifest}
