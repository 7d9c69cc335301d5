"""Boxes of a volume on Dask distributed: workers that may die, and the bits of one process.

Boxes are cut before, by :mod:`voxfuse.scale`, and submitted one by one: there is no graph of
arrays, whose scheduler would hold intermediate chunks. A worker has nothing that another one needs,
so that one that dies loses a box. Importing this module needs the extra ``voxfuse[cluster]``.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import threading
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from voxfuse.inference.request import Request
from voxfuse.inference.volumes import Cost, VolumeJob, open_volume, settle
from voxfuse.scale._optional import require
from voxfuse.scale.job import Run

distributed: Any = require("distributed", "--workers, --scheduler", '"voxfuse[cluster]"')

#: How many workers of ``--workers`` may die with a box before the run ends with an error. Another
#: scheduler has a number of its own.
ALLOWED_FAILURES = 5
#: A worker is ended, and started again, beyond this times the memory of the plan.
SLACK = 1.5
#: Before a worker of ``--workers`` begins: Ctrl-C reaches it too, but it is this process that ends
#: it, without more words.
_WORKER = """
import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
"""
#: What the command shows as an error of its own.
_SHOWN = (ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError)


class Prepared(distributed.WorkerPlugin):  # type: ignore[misc]
    """On a worker: its model and its job, made once, by the first that needs them."""

    def __init__(self, name: str, request: Request, threads: int | None) -> None:
        self.name, self.request, self.threads = name, request, threads

    def setup(self, worker: Any) -> None:
        """When a worker begins; what takes long would hold up its messages here."""
        self.lock = threading.Lock()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One thing after the other, also on a worker of several threads."""
        with self.lock:
            if self.threads is not None:
                torch.set_num_threads(self.threads)
            yield

    @cached_property
    def volume(self) -> VolumeJob:
        """The prepared job."""
        return open_volume(self.request)

    @cached_property
    def run(self) -> Run:
        """Its boxes: the manifest is read and the network tried once, not for each."""
        return self.volume.job.begun(self.volume.folder)


def _do(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """On a worker: what one of the functions below does.

    Raises:
        Exception: of a type that is known wherever this package is, not of a model's code.
    """
    plugin: Prepared = distributed.get_worker().plugins[name]
    try:
        with plugin.alone():
            return function(plugin, *arguments, **options)
    except (Exception, SystemExit) as error:
        shown = _shown(error)
    raise shown  # here, where it has no context, which would be pickled with it


def _shown(error: BaseException) -> BaseException:
    kind = type(error)
    if isinstance(error, _SHOWN) and kind.__module__.partition(".")[0] in ("builtins", "voxfuse"):
        error.__cause__ = error.__context__ = None
        return error
    return RuntimeError(f"{kind.__name__}: {error}".rstrip(": "))


def _begin(plugin: Prepared) -> None:
    """Nothing yet."""


def _settle(plugin: Prepared, least: int, **options: Any) -> Cost:
    """Prepare the job."""
    plugin.volume, cost = settle(plugin.request, lambda cost: cost.check_worker(least), **options)
    return cost


def _look(plugin: Prepared) -> list[int]:
    """The boxes that are not done."""
    return plugin.volume.job.remaining(plugin.volume.folder)


def _predict(plugin: Prepared, index: int) -> None:
    """A box, if it is not done."""
    if not plugin.run.is_done(index):
        plugin.run.predict(index)


class Cluster:
    """Workers that know a volume: they load the model, this process does not.

    A context, at whose end they forget it. A scheduler may have several at once.

    Args:
        client: of the scheduler.
        request: what is asked for. Its paths are the same on every worker.
        threads: of PyTorch's, on a worker; None: as they are.
    """

    def __init__(self, client: Any, request: Request, threads: int | None = None) -> None:
        self._client, self._name = client, f"voxfuse-{uuid.uuid4().hex}"
        client.register_plugin(Prepared(self._name, _absolute(request), threads))

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client.status == "running":  # else it would look for its scheduler first
            with contextlib.suppress(Exception):
                self._client.unregister_worker_plugin(self._name)

    def wait(self) -> None:
        """Until there is a worker.

        It is asked for by a task: a cluster that adapts starts none before there is one.
        """
        self._one(_begin)

    def threads(self) -> list[int]:
        """Of each worker, one of which does a box."""
        return [each["nthreads"] for each in self._workers()]

    def memory(self) -> list[int]:
        """Bytes that each worker may take; 0: as many as it wants."""
        return [each["memory_limit"] or 0 for each in self._workers()]

    def settle(self, **options: Any) -> Cost:
        """Prepare the job on a worker, on which bits are those of the others.

        Args:
            options: of :func:`voxfuse.inference.volumes.settle`, but ``request`` and ``check``.

        Raises:
            MemoryError: a box would not fit a worker.
        """
        if options.get("foreground"):
            options["foreground"] = _absolute_volume(options["foreground"])
        least = min((limit for limit in self.memory() if limit), default=1 << 62)
        return self._one(_settle, least, **options)  # type: ignore[no-any-return]

    def predict(self, progress: Callable[[int, int], object] = lambda done, count: None) -> None:
        """Predict what is not done of the prepared volume.

        A box is done again where its worker died; one that two workers do is written twice with the
        same bytes.

        Args:
            progress: called with the boxes that are done, and the number of all that were missing.

        Raises:
            RuntimeError: more workers died with a box than the scheduler allows.
            Exception: what a box raised.
        """
        missing = self._one(_look)
        futures = {self._submit(_predict, index) for index in missing}
        try:
            ended = distributed.as_completed(list(futures), loop=self._client.loop)
            for done, future in enumerate(ended, 1):
                _result(future)
                futures.remove(future)
                future.release()  # else it is done again where its worker dies later
                progress(done, len(missing))
        finally:
            if self._client.status == "running":
                self._client.cancel(list(futures))

    def _workers(self) -> Collection[Any]:
        return self._client.scheduler_info(n_workers=-1)["workers"].values()  # type: ignore[no-any-return]

    def _one(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return _result(self._submit(function, *arguments, **options))

    def _submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        return self._client.submit(_do, self._name, function, *arguments, pure=False, **options)


def _result(future: Any) -> Any:
    try:
        return future.result()
    except distributed.KilledWorker as error:
        raise RuntimeError(
            f"{error.allowed_failures + 1} workers died that had the same box, which is more than "
            "the scheduler allows; their logs say why. Where it is for memory, take a smaller "
            "--batch or --patch. The same command goes on with what is missing"
        ) from None
    except (distributed.CancelledError, distributed.comm.CommClosedError):
        raise RuntimeError(
            "the scheduler is gone, or was restarted by another one who uses it; the same command "
            "goes on with what is missing"
        ) from None


def _absolute_volume(foreground: str) -> str:
    try:
        float(foreground)
    except ValueError:
        return str(Path(foreground).absolute())
    return foreground


def _absolute(request: Request) -> Request:
    """The request for processes that were started in another folder."""

    def whole(name: str) -> str:
        path, colon, attribute = name.rpartition(":")
        if name.endswith((".pt2", ".npz")):
            return str(Path(name).absolute())
        return f"{Path(path).absolute()}:{attribute}" if colon and path.endswith(".py") else name

    return replace(
        request,
        model=whole(request.model),
        head=None if request.head is None else whole(request.head),
        input=[path.absolute() for path in request.input],
        output=request.output.absolute(),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch with the number of threads that workers have, on which bits may depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def local_cluster(workers: int, memory: int, quiet: bool = False) -> Iterator[Any]:
    """A client of a cluster of this machine, which listens on 127.0.0.1 alone.

    Args:
        workers: how many processes, of one thread each.
        memory: bytes that one of them takes by the plan.
        quiet: whether its warnings are kept back.
    """
    import dask

    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_FAILURES,
        # There is nothing to spill, and who waits for memory that is PyTorch's waits for ever.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 1.0,
        "distributed.worker.preload": [_WORKER],
    }
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=round(SLACK * memory),
            silence_logs=logging.ERROR if quiet else logging.WARNING,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@contextmanager
def client_of(address: str, without_tls: bool = False) -> Iterator[Any]:
    """A client of a scheduler that runs already; certificates are those of Dask's configuration.

    Args:
        address: such as tls://host:8786. It runs pickles of all who reach it.
        without_tls: whether an address of another machine may be without TLS.

    Raises:
        ValueError: the address is of another machine, and not ``tls://``.
        OSError: there is no scheduler.
    """
    if not (without_tls or address.startswith("tls://") or _is_here(address)):
        raise ValueError(
            f"--scheduler: got {address}, expected tls://HOST:PORT: a scheduler runs the code of "
            "whoever reaches it. --without-tls says that nobody else reaches this one"
        )
    try:
        # A client that finds none tells so once more when it is collected.
        distributed.utils.LoopRunner().run_sync(_reach, address)
        client = distributed.Client(address, set_as_default=False)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise OSError(f"--scheduler: {address}: {error or 'does not answer'}") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what is lost is raised
    with client:
        yield client


async def _reach(address: str) -> None:
    arguments = distributed.Security().get_connection_args("client")
    comm = await distributed.comm.connect(address, **arguments)
    await comm.close()


def _is_here(address: str) -> bool:
    """Whether a scheduler is one of this machine, which listens to it alone."""
    protocol, _, place = address.rpartition("://")
    if protocol not in ("", "tcp"):
        return False
    try:
        host = urlsplit(f"//{place}").hostname
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
