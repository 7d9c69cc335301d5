"""Networks by what names them: an exported program, or an attribute of a module."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from voxfuse._files import sha256_of
from voxfuse.scale.manifest import digest, digest_of_model
from voxfuse.training.predict import device_of, first_output

#: Why a file needs the user's word.
_WHY = (
    "loading it can run code that whoever made it put in (constants are pickled, expressions "
    "evaluated), with your rights; --trust-model says that you know where it comes from"
)

Head = tuple[Tensor, Tensor]

_loading = threading.Lock()
#: Modules that FILE.py imported from beside it; see :func:`_importing`.
_beside: list[str] = []


@dataclass(frozen=True)
class Network:
    """What patches are given to, and what it takes.

    Calling it takes patches (b, C, \\*patch) of any number on any device, and returns the finest
    output on the network's own: where it takes another number of patches, the last ones are added
    and cut off again.
    """

    call: Callable[[Tensor], Any]
    device: torch.device
    kind: str  #: "export" or "module"
    digest: str  #: of the file, or the state and the code; or what the user calls it
    batch: tuple[int, int | None] = (1, None)  #: patches a call, at least and at most
    inputs: int | None = None  #: channels of a patch
    patch: tuple[int | None, ...] | None = None  #: extent of a patch, where there is only one
    head: Head | None = None  #: the last layer, where the network returns what comes before it
    whole: Callable[[Tensor], Tensor] | None = None  #: the network with that layer, if it had it

    def __call__(self, patches: Tensor) -> Tensor:
        count = patches.shape[0]
        missing = max(self.batch[0] - count, 0)
        if missing:
            patches = torch.cat([patches, patches[-1:].expand(missing, *patches.shape[1:])])
        patches = patches.to(self.device)
        try:
            returned = self.call(patches)
        except (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError):
            raise
        except Exception as error:  # no traceback is the command's answer to it
            raise RuntimeError(f"the network raised {_said(error)}") from error
        if isinstance(returned, dict):
            returned = list(returned.values())
        return first_output(returned)[:count]


def load_network(
    name: str,
    device: str = "auto",
    *,
    trust: bool = False,
    identity: str | None = None,
    head: str | None = None,
) -> Network:
    """The network that ``--model`` names.

    Args:
        name: a file of ``torch.export.save`` (``.pt2``); or ``MODULE:ATTR`` or ``FILE.py:ATTR``, a
            network, or a function without arguments that returns one.
        device: as PyTorch names it; "auto" is a GPU if there is one.
        trust: load a file though that can run code.
        identity: what the network is called in place of a digest.
        head: see :func:`load_head`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what is named is no network, or needs another option.
    """
    place = device_of(device, "--device")
    if name.endswith(".pt2"):
        made = _exported(Path(name), place, trust)
    else:
        made = _attribute(name, place, identity)
    made = replace(made, digest=identity or made.digest)
    return made if head is None else load_head(head, made)


def is_network(name: str) -> bool:
    """Whether ``--model`` names a network, not a run of ``voxfuse train``."""
    return not Path(name).is_dir() and (name.endswith(".pt2") or ":" in name)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file."""
    return f"sha256:{sha256_of(path)}"


# --- Exported programs ----------------------------------------------------------------------------


def _exported(path: Path, device: torch.device, trust: bool) -> Network:
    if not path.is_file():
        raise FileNotFoundError(f"--model: there is no file {path}")
    if not trust:
        raise ValueError(f"--model: {path} is an exported program: {_WHY}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"--model: {path} is no file of torch.export.save")
    with zipfile.ZipFile(path) as archive:
        if any("aotinductor" in name for name in archive.namelist()):
            raise ValueError(
                f"--model: {path} was compiled by AOTInductor, expected torch.export.save's"
            )
    try:
        program = torch.export.load(path)
    except Exception as error:  # of many kinds
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"--model: {path} cannot be loaded: {why}") from None
    shape = _input_shape(path, program)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    sizes = [None if isinstance(n, torch.SymInt) else int(n) for n in shape]
    least, most = _bounds(program, shape[0])
    return Network(
        program.module(),
        device,
        "export",
        digest_of_file(path),
        batch=(least, most),
        inputs=sizes[1],
        patch=tuple(sizes[2:]),
    )


def _input_shape(path: Path, program: Any) -> tuple[Any, ...]:
    names = set(program.graph_signature.user_inputs)
    values = [
        node.meta.get("val")
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in names
    ]
    if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 5:
        got = ", ".join(str(tuple(getattr(v, "shape", ()))) for v in values)
        raise ValueError(
            f"--model: {path} takes inputs of shapes {got}, expected one (batch, channels, x, y, z)"
        )
    return tuple(values[0].shape)


def _bounds(program: Any, batch: Any) -> tuple[int, int | None]:
    """Patches that a call takes."""
    if not isinstance(batch, torch.SymInt):
        return int(batch), int(batch)
    for symbol, allowed in program.range_constraints.items():
        if str(symbol) == str(batch.node.expr):
            # Compiled programs of any batch may still not take one of 1.
            return max(1, int(allowed.lower)), _finite(allowed.upper)
    return 1, None


def _finite(upper: Any) -> int | None:
    try:
        number = float(upper)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if math.isfinite(number) and number < 1 << 31 else None


# --- Attributes of modules ------------------------------------------------------------------------


def _attribute(name: str, device: torch.device, identity: str | None) -> Network:
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise ValueError(f"--model: got {name!r}, expected FILE.pt2, MODULE:ATTR or a run's folder")
    with _importing(source) as code:
        found = _found(name, source, attribute)
    if not callable(found):
        raise ValueError(f"--model: {name}() returned {type(found).__name__}, expected a network")
    if isinstance(found, nn.Module):
        found.eval().requires_grad_(False).to(device)
        state = digest_of_model(found)
        whole = digest([state, code]) if code else state
        return Network(found, device, "module", f"sha256:{whole}")
    if identity is None:
        raise ValueError(
            f"--model: {name}() returned {type(found).__name__}, which has no state to take a "
            "digest of; --model-id says what it is called"
        )
    return Network(found, device, "module", identity)


def _found(name: str, source: str, attribute: str) -> Any:
    """The network, or what the function returns."""
    found: Any = _module(source)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model: {source} has no {attribute}")
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    if isinstance(found, type) and issubclass(found, nn.Module):
        raise ValueError(
            f"--model: {name} is a class, whose networks have random weights, expected a "
            "network, or a function without arguments that returns one with its weights"
        )
    if not callable(found):
        raise ValueError(
            f"--model: {name} is of type {type(found).__name__}, expected a network, or a "
            "function without arguments that returns one"
        )
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model: {name}() raised {_said(error)}") from error


def _module(source: str) -> Any:
    path = Path(source)
    if source.endswith(".py"):
        if not path.is_file():
            raise FileNotFoundError(f"--model: there is no file {path}")
        name = f"voxfuse_model_{path.stem}"  # monai.py would replace MONAI
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module
        try:
            specification.loader.exec_module(module)
        except (Exception, SystemExit) as error:  # a script without a main guard
            raise ValueError(f"--model: {path} raised {_said(error)}") from error
        return module
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name != source.partition(".")[0] and error.name != source:
            raise
        raise ValueError(
            f"--model: there is no module {source} in this folder or where Python looks"
        ) from None
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model: {source} raised {_said(error)}") from error


@contextmanager
def _importing(source: str) -> Iterator[dict[str, str]]:
    """Modules beside FILE.py, or in this folder, are found too, as with ``python -m``.

    Those beside FILE.py are imported anew: a process that loads several models, a worker of Dask,
    would take one of an earlier file or another folder. Until then they stay, as code that runs
    later may look for them.

    Yields:
        After it, SHA-256 by name of FILE.py and of what it imported from beside it.
    """
    of_file = source.endswith(".py")
    folder = Path(source).parent.resolve() if of_file else Path.cwd()
    code: dict[str, str] = {}
    with _loading:
        for name in _beside:
            sys.modules.pop(name, None)
        _beside.clear()
        importlib.invalidate_caches()
        # Not what the process has for itself, as this package if it lies in that folder.
        before = {name.partition(".")[0] for name in sys.modules}
        sys.path.insert(0, str(folder))
        try:
            yield code
        finally:
            if str(folder) in sys.path:
                sys.path.remove(str(folder))
            if of_file:
                for name, module in list(sys.modules.items()):
                    first = name.partition(".")[0]
                    place = _place_of(module, folder)
                    if place and first not in before and place.parts[0] in (first, f"{first}.py"):
                        _beside.append(name)
                        if place.suffix == ".py":
                            code[place.as_posix()] = sha256_of(folder / place)
        if of_file:
            code[Path(source).name] = sha256_of(Path(source))


def _place_of(module: Any, folder: Path) -> Path | None:
    """Of a module of Python in a folder, or a package of such, as seen from there."""
    try:
        place = Path(getattr(module, "__file__", None) or next(iter(module.__path__)))
        place = place.relative_to(folder)
    except (AttributeError, TypeError, ValueError, StopIteration):
        return None
    return place if place.suffix in ("", ".py") and place.parts else None


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


# --- The last layer -------------------------------------------------------------------------------


def load_head(name: str, network: Network) -> Network:
    """The network with its last, linear layer apart, so that features can be fused.

    Args:
        name: a file ``.npz`` with arrays ``weight`` (C, K) and ``bias`` (C,), of a network that
            returns the K features; or the name of a layer of the network, a convolution of extent 1
            that comes last.
        network: see :func:`load_network`.

    Raises:
        ValueError: no such layer, or one that is no convolution of extent 1.
    """
    if name.endswith(".npz"):
        return replace(network, head=_head_of_file(Path(name)))
    if not isinstance(network.call, nn.Module) or network.kind != "module":
        raise ValueError(f"--head: got {name!r}, expected a file .npz with this --model")
    layers = dict(network.call.named_modules())
    layer = layers.get(name)
    weight = getattr(layer, "weight", None)
    if not name or not isinstance(layer, nn.Conv3d) or weight is None:
        known = [n for n, m in layers.items() if isinstance(m, nn.Conv3d) and _linear(m)]
        raise ValueError(
            f"--head: got {name!r}, expected a file .npz or one of this network's convolutions of "
            f"extent 1: {', '.join(known) or 'there is none'}"
        )
    if not _linear(layer):
        raise ValueError(f"--head: {name} is {layer}, expected a convolution of extent 1")
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias
    parent, _, last = name.rpartition(".")
    place = network.call.get_submodule(parent)

    def whole(patches: Tensor) -> Tensor:
        setattr(place, last, layer)
        try:
            return network(patches)
        finally:
            setattr(place, last, nn.Identity())

    setattr(place, last, nn.Identity())
    return replace(network, head=(weight.detach().flatten(1), bias.detach()), whole=whole)


def _linear(layer: nn.Conv3d) -> bool:
    return set(layer.kernel_size) == {1} and set(layer.stride) == {1} and layer.groups == 1


def _head_of_file(path: Path) -> Head:
    if not path.is_file():
        raise FileNotFoundError(f"--head: there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weight, bias = (torch.from_numpy(arrays[key]).float() for key in ("weight", "bias"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"--head: {path} has no arrays weight and bias: {error}") from None
    weight = weight.flatten(1) if weight.ndim > 2 else weight
    if weight.ndim != 2 or tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(
            f"--head: {path} has weight {tuple(weight.shape)} and bias {tuple(bias.shape)}, "
            "expected (C, K) and (C,)"
        )
    return weight, bias
