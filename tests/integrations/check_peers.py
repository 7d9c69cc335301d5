"""Hold the adapters against other versions of their peers than the pinned ones.

    python tests/integrations/check_peers.py FOLDER [REQUIREMENT ...]

Each requirement (``monai``, ``torchio==2.0.0a2``; ``--pre`` after a name takes pre-releases) gets
an environment of its own in FOLDER, on top of the running one, and the tests of its adapters run
there. What the peer's classes have come to take, or no longer do, is printed before. The exit
status is the number of requirements that failed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple


class Peer(NamedTuple):
    """What is looked at of a distribution."""

    #: A pattern of its adapters' test files.
    tests: str
    modules: list[str]
    #: A pattern of the classes' names.
    classes: str
    #: Whether its dependencies come with it.
    dependencies: bool


PEERS = {
    "monai": Peer(
        "test_monai*.py",
        ["monai.losses", "monai.inferers"],
        "Loss|Inferer",
        True,
    ),
    "nnunetv2": Peer("test_nnunet*.py", ["nnunetv2.training.loss"], "(?i)loss|dice|dc", False),
    "segmentation-models-pytorch": Peer(
        "test_smp*.py", ["segmentation_models_pytorch.losses"], "Loss", False
    ),
    "torchio": Peer("test_torchio*.py", ["torchio"], "Aggregator|GridSampler", True),
}

#: Without asking: the newest of all, and what the adapters follow beside the pinned version.
DEFAULT = [
    "monai",
    "nnunetv2",
    "segmentation-models-pytorch==0.5.0",
    "segmentation-models-pytorch",
    "torchio",
    "torchio --pre",
]

#: Prints the version and the constructors of a distribution's classes. Its ``__init__`` does not
#: run where it imports what is not installed.
SIGNATURES = """
import importlib, importlib.metadata, importlib.util, inspect, json, pkgutil, re, sys, types
name, pattern, *modules = sys.argv[1:]
found = {}
for path in modules:
    root = path.split(".")[0]
    try:
        module = importlib.import_module(path)
    except ImportError:
        for loaded in [x for x in sys.modules if x.split(".")[0] == root]:
            del sys.modules[loaded]
        bare = types.ModuleType(root)
        bare.__path__ = list(importlib.util.find_spec(root).submodule_search_locations)
        sys.modules[root] = bare
        module = importlib.import_module(path)
    inner = pkgutil.iter_modules(module.__path__) if path != root else []
    modules = [module, *(importlib.import_module(f"{path}.{x.name}") for x in inner)]
    for one in modules:
        for key, kind in vars(one).items():
            own = inspect.isclass(kind) and kind.__module__.split(".")[0] == root
            if own and re.search(pattern, key):
                found[key] = [
                    x.name if x.default is x.empty else f"{x.name}={x.default}"
                    for x in inspect.signature(kind).parameters.values()
                ]
print(json.dumps([importlib.metadata.version(name), found]))
"""


def environment(folder: Path) -> Path:
    """A Python whose packages come before those of the running one."""
    venv.create(folder, with_pip=True, clear=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def install(python: Path, requirement: str, dependencies: bool) -> None:
    # The running torch stays: another would not fit the compiled kernels.
    torch = [] if not dependencies else [f"torch=={version_of(Path(sys.executable), 'torch')}"]
    options = [] if dependencies else ["--no-deps"]
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--upgrade"]
    subprocess.run([*pip, *options, *requirement.split(), *torch], check=True)


def version_of(python: Path, name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip().split("+")[0]


def signatures(python: Path, name: str) -> tuple[str, dict[str, list[str]]]:
    command = [
        python,
        "-W",
        "ignore",
        "-c",
        SIGNATURES,
        name,
        PEERS[name].classes,
        *PEERS[name].modules,
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    version, found = json.loads(done.stdout.splitlines()[-1])
    return version, found


def changes(before: dict[str, list[str]], after: dict[str, list[str]]) -> list[str]:
    """Classes and arguments that came, went or changed."""
    lines = [f"gone: {name}" for name in sorted(before.keys() - after.keys())]
    lines += [f"new: {name}" for name in sorted(after.keys() - before.keys())]
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            lines += [f"{name}({', '.join(before[name])})", f"  -> ({', '.join(after[name])})"]
    return lines


def main() -> int:
    folder, *wanted = sys.argv[1:]
    tests = Path(__file__).parent
    failed, pinned = [], {}
    for requirement in wanted or DEFAULT:
        name = requirement.split()[0].split("=")[0]
        peer = PEERS[name]
        python = environment(Path(folder) / requirement.replace(" ", "").replace("=", "-"))
        install(python, requirement, peer.dependencies)
        if name not in pinned:
            pinned[name] = signatures(Path(sys.executable), name)
        (old, before), (new, after) = pinned[name], signatures(python, name)
        print(f"\n=== {requirement}: {new} (pinned: {old})", flush=True)
        print("\n".join(changes(before, after)) or "no constructor differs", flush=True)
        command = [python, "-m", "pytest", "-q", *map(str, sorted(tests.glob(peer.tests)))]
        if subprocess.run(command).returncode:
            failed.append(f"{requirement} ({new})")
    print("\nfailed: " + (", ".join(failed) or "none"))
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
