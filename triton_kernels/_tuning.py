"""Which launch configuration a kernel runs in: the default, or one that was measured.

A *family* is a kind of launch whose block shapes may vary. Its module states, in a function
``configurations``, the few that it may have for a given problem; the first is the default. Without
tuning every launch takes the default, which follows from shape and dtype alone.

Tuning is asked for: by ``VOXFUSE_TUNE=1``, by ``voxfuse.tune`` or by ``voxfuse tune``. Then the
first launch with a key that has no choice yet measures the configurations and remembers the best
one, in a file. Later processes read it, once each, so that the bits stay the same from run to run;
``VOXFUSE_TUNE=0`` ignores it.

Nothing is measured while a CUDA graph is captured, and nothing in Triton's interpreter.
"""

import contextlib
import functools
import hashlib
import json
import os
import random
import statistics
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

#: Version of the file's form.
FORMAT = 1
#: Rounds of a measurement, and fewer after so many seconds.
ROUNDS, LEAST_ROUNDS, SECONDS = 15, 5, 0.5
#: A configuration takes the default's place if its median is shorter by at least this share ...
LEAST_GAIN = 0.02
#: ... and by more than what the 20th and 80th percentiles of both lie apart, on average.
PERCENTILES = (0.2, 0.8)
#: Bytes that are read between two calls, at least: more than any second-level cache holds.
COLD_BYTES = 1 << 28
#: Problems whose configuration is kept at hand.
MOST_PROBLEMS = 4096

OFF, READ, MEASURE = "0", "", "1"

#: A configuration is a NamedTuple of numbers.
Configuration = Any
Call = Callable[..., None]


# --- the file ------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where the file of choices lies: VOXFUSE_CACHE_DIR, else voxfuse in the user's cache."""
    own = os.environ.get("VOXFUSE_CACHE_DIR")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "voxfuse"


def cache_file() -> Path:
    """The file of choices of every device, readable JSON."""
    return cache_folder() / "tuned.json"


@functools.cache
def kernels_version() -> str:
    """A hash of the kernels' sources, which state the sets: what was measured for other kernels
    is not used.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Damaged(ValueError):
    """The file is not one of ours."""


def read_file(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Choices by device and key; nothing if there is no file.

    Raises:
        Damaged: the file is there, but not in our form.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Damaged(f"expected a JSON object with format {FORMAT}")
    tables = found.get("devices")
    rows = tables.values() if isinstance(tables, dict) else [None]
    if not all(isinstance(row, dict) for row in rows) or not all(
        isinstance(choice, dict) and isinstance(choice.get("configuration"), dict)
        for row in rows
        for choice in row.values()
    ):
        raise Damaged("expected under devices, for every device, its configurations by key")
    return tables


def _write_file(path: Path, tables: dict[str, Any]) -> None:
    """Put the whole file in the place of the one before, or leave that."""
    whole = {
        "format": FORMAT,
        "about": "Launch configurations that voxfuse measured to be the fastest of their set. "
        "`voxfuse tune --clear` removes them; VOXFUSE_TUNE=0 ignores them.",
        "devices": tables,
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1, sort_keys=True)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time reads the file, adds to it and writes it."""
    try:
        import fcntl
    except ImportError:  # not on this system: the last to write wins, and each file is whole
        yield
        return
    with (folder / "tuned.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def clear() -> Path | None:
    """Remove the file of choices; its path, or None if there was none."""
    path = cache_file()
    forget()
    (path.parent / "tuned.lock").unlink(missing_ok=True)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    return path


# --- what this process knows ---------------------------------------------------------------------


def mode() -> str:
    """What VOXFUSE_TUNE asks for.

    Raises:
        ValueError: it is neither 0 nor 1 nor empty.
    """
    value = os.environ.get("VOXFUSE_TUNE", READ)
    if value not in (OFF, READ, MEASURE):
        raise ValueError(f"VOXFUSE_TUNE: got {value!r}, expected 0, 1 or nothing")
    return value


class _State:
    """The choices of this process, read from the file once."""

    def __init__(self, measuring: bool | None = None) -> None:
        asked = mode()
        self.measuring = asked == MEASURE if measuring is None else measuring
        self.tables: dict[str, dict[str, Any]] = {}
        self.damaged = False
        #: Configuration by (family, problem, device); None: the default.
        self.chosen: dict[tuple[Any, ...], Configuration | None] = {}
        self.log: list[Measurement] = []
        if asked != OFF or self.measuring:
            try:
                self.tables = read_file(cache_file())
            except Damaged as error:
                self.damaged = True
                warnings.warn(
                    f"voxfuse does not use its tuned launch configurations: {cache_file()} is "
                    f"damaged or not its own ({error}). `voxfuse tune --clear` removes it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        #: Whether a launch has anything to look up.
        self.active = self.measuring or bool(self.tables)

    def keep(self, device: str, key: str, choice: dict[str, Any]) -> dict[str, Any]:
        """Remember a choice, here and in the file; the one that is in force.

        Where another process was faster, that is its choice: the processes of one machine then
        agree.
        """
        if not self.damaged:
            path = cache_file()
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _locked(path.parent):
                    tables = read_file(path)
                    choice = tables.setdefault(device, {}).setdefault(key, choice)
                    _write_file(path, tables)
            except (OSError, Damaged) as error:
                self.damaged = True
                warnings.warn(
                    f"voxfuse cannot keep tuned launch configurations in {path} ({error}); they "
                    "hold for this process alone. VOXFUSE_CACHE_DIR names another folder.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.tables.setdefault(device, {})[key] = choice
        return choice


_state: _State | None = None
#: Two threads that measured at once would disturb each other.
_one_at_a_time = threading.Lock()


def state() -> _State:
    global _state
    if _state is None:
        _state = _State()
    return _state


def forget() -> None:
    """Read environment and file again at the next launch."""
    global _state
    _state = None


@contextlib.contextmanager
def measuring() -> Iterator[list["Measurement"]]:
    """Measure what has no choice yet, whatever VOXFUSE_TUNE says; yields what was measured."""
    global _state
    before = _state
    _state = _State(measuring=True)
    try:
        yield _state.log
    finally:
        log, tables = _state.log, _state.tables
        _state = before
        if before is not None and log and mode() != OFF:
            before.tables, before.active = tables, True
            before.chosen.clear()


def device_name(device: torch.device) -> str | None:
    """What the choices of a device are kept under; None if it has none."""
    if device.type != "cuda":
        return None
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, "
        f"Triton {triton.__version__}, kernels {kernels_version()}"
    )


def capturing(device: torch.device) -> bool:
    """Whether launches go into a graph, so that nothing can be measured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which events are recorded on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# --- measuring -----------------------------------------------------------------------------------


class Clock:
    """Device time of a call, with a cold second-level cache.

    The launches hide behind the reads that empty the cache. Writes would leave lines that the call
    has to write back.
    """

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        size = max(COLD_BYTES, 4 * int(getattr(properties, "L2_cache_size", 0)))
        self._evict = torch.ones(size // 4, device=device)
        self._start = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def seconds(self, call: Callable[[], None]) -> float:
        self._evict.sum()
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


class Measurement(NamedTuple):
    """Medians in seconds of the configurations of one key, in their order, and what was chosen.

    A configuration that cannot run here or gave other results has no median.
    """

    device: str
    key: str
    configurations: tuple[Configuration, ...]
    medians: tuple[float | None, ...]
    chosen: int


def spread(seconds: Sequence[float]) -> float:
    """Distance of the 20th and the 80th percentile."""
    ordered = sorted(seconds)
    low, high = (ordered[round(p * (len(ordered) - 1))] for p in PERCENTILES)
    return high - low


def fastest(seconds: Sequence[Sequence[float]]) -> int:
    """Index of the shortest median if it beats the first by more than the noise, else 0.

    An empty sequence is a configuration that is out.
    """
    medians = [statistics.median(s) if s else float("inf") for s in seconds]
    best = min(range(len(medians)), key=medians.__getitem__)
    gain = medians[0] - medians[best]
    noise = (spread(seconds[0]) + spread(seconds[best])) / 2
    return best if gain > max(noise, LEAST_GAIN * medians[0]) else 0


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, and where there is no number, neither is there in the other."""
    equal = actual == expected
    if actual.is_floating_point():
        equal |= actual.isnan() & expected.isnan()
    return bool(equal.all())


def same_sums(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal but for the order of summation: of at most 128 numbers in float32, then in float64."""
    narrow = torch.finfo(torch.float32).eps
    scale = expected.abs().nan_to_num().amax() if expected.numel() else 0.0
    near = (actual - expected).abs() <= 128 * narrow * (expected.abs() + scale)
    near |= (actual == expected) | (actual.isnan() & expected.isnan())
    return bool(near.all())


class Family:
    """Launches of one kind.

    ``configurations(problem)`` is the set, ``describe(problem)`` the key: problems with the same
    one share a choice. ``exact`` says that the configurations give the same bits; else they give
    sums within rounding.
    """

    def __init__(
        self,
        name: str,
        configurations: Callable[[Any], Sequence[Configuration]],
        describe: Callable[[Any], str],
        exact: bool,
    ) -> None:
        self.name = name
        self.configurations = configurations
        self.describe = describe
        self.exact = exact

    def run(self, problem: Any, outputs: tuple[torch.Tensor, ...], call: Call) -> None:
        """``call(configuration, *outputs)``, which writes into ``outputs``.

        ``configuration`` is None for the default.
        """
        now = _state or state()
        if not now.active:
            call(None, *outputs)
            return
        device = outputs[0].device
        place = (self.name, problem, device)
        try:
            configuration = now.chosen[place]
        except KeyError:
            configuration = self._decide(now, place, outputs, call)
        call(configuration, *outputs)

    def _decide(
        self, now: _State, place: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], call: Call
    ) -> Configuration | None:
        _, problem, device = place
        described = device_name(device)
        found = None
        if described is not None:
            key = f"{self.name} {self.describe(problem)}"
            allowed = tuple(self.configurations(problem))
            choice = now.tables.get(described, {}).get(key)
            if choice is None and now.measuring and len(allowed) > 1:
                if capturing(device):
                    return None  # and decide when nothing is captured
                with _one_at_a_time, _current(device):
                    choice = now.tables.get(described, {}).get(key)
                    if choice is None:
                        choice = self._measure(now, described, key, problem, outputs, call)
            if choice is not None:
                found = next(
                    (c for c in allowed if c._asdict() == choice["configuration"]),
                    None,
                )
        if len(now.chosen) >= MOST_PROBLEMS:
            now.chosen.clear()
        now.chosen[place] = found
        return found

    def _measure(
        self,
        now: _State,
        device: str,
        key: str,
        problem: Any,
        outputs: tuple[torch.Tensor, ...],
        call: Call,
    ) -> dict[str, Any] | None:
        """Measure the set and keep the best; None where there is no memory to measure in."""
        allowed = tuple(self.configurations(problem))
        try:
            right = self._right(problem, allowed, outputs, call)
            scratch = tuple(x.clone() for x in outputs)
            calls = [functools.partial(call, configuration, *scratch) for configuration in allowed]
            seconds = measure(calls, right, clock(outputs[0].device))
        except torch.OutOfMemoryError as error:
            warnings.warn(
                f"voxfuse has no memory to measure launch configurations for {key} and takes the "
                f"default: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        chosen = fastest(seconds)
        medians = tuple(statistics.median(s) if s else None for s in seconds)
        now.log.append(Measurement(device, key, allowed, medians, chosen))
        return now.keep(
            device,
            key,
            {
                "configuration": allowed[chosen]._asdict(),
                "default": allowed[0]._asdict(),
                "default_us": _microseconds(medians[0]),
                "us": _microseconds(medians[chosen]),
            },
        )

    def _right(
        self,
        problem: Any,
        allowed: Sequence[Configuration],
        outputs: tuple[torch.Tensor, ...],
        call: Call,
    ) -> list[bool]:
        """Which configurations run here and give what the default gives."""
        compare = same_bits if self.exact else same_sums
        expected = tuple(x.clone() for x in outputs)
        call(allowed[0], *expected)
        right = [True]
        for configuration in allowed[1:]:
            actual = tuple(x.clone() for x in outputs)
            try:
                call(configuration, *actual)
            except Exception as error:
                # Triton's own exceptions, for a device with too little of something.
                if not type(error).__module__.startswith("triton"):
                    raise
                right.append(False)
                continue
            same = all(compare(a, b) for a, b in zip(actual, expected, strict=True))
            if not same:
                warnings.warn(
                    f"{self.name}: {configuration} gives another result than {allowed[0]} for "
                    f"{self.describe(problem)} and is left out. Please report this.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            right.append(same)
        return right


def _microseconds(seconds: float | None) -> float:
    return round(1e6 * (seconds or 0.0), 2)


def up_to(count: int, what: str) -> str:
    """``count`` rounded up to a power of two, for keys."""
    return f"up to 2^{max(count - 1, 0).bit_length()} {what}"


#: Makes the clock of a device; tests put one in its place that needs no GPU.
clock: Callable[[torch.device], Any] = Clock


def measure(
    calls: Sequence[Callable[[], None]], right: Sequence[bool], timer: Any
) -> list[list[float]]:
    """Seconds of every call that is right, interleaved, every round in an order of its own."""
    order = random.Random(0)
    places = [i for i, ok in enumerate(right) if ok]
    seconds: list[list[float]] = [[] for _ in calls]
    spent = 0.0
    for done in range(ROUNDS):
        for i in order.sample(places, len(places)):
            seconds[i].append(timer.seconds(calls[i]))
            spent += seconds[i][-1]
        if done + 1 >= LEAST_ROUNDS and spent > SECONDS:
            break
    return seconds
