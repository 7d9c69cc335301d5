"""Boxes on Dask distributed: workers that are killed, and the bits of one process."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tests.inference.test_studies import NETWORKS, predict

distributed = pytest.importorskip("distributed", reason="needs the extra cluster")
zarr = pytest.importorskip("zarr", reason="needs the extra cluster")

import dask  # noqa: E402
import psutil  # noqa: E402

from voxfuse.inference import cluster  # noqa: E402
from voxfuse.scale import open_destination  # noqa: E402

OPTIONS = ["--patch", 16, "--batch", 4]


def result(path):
    return np.asarray(open_destination(str(path), labels="segmentation").array[...])


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    """A volume, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("volume")
    array = np.random.default_rng(0).standard_normal((500, 30, 20)).astype(np.float32)
    zarr.create_array(str(folder / "in.zarr"), data=array, chunks=(50, 30, 20))
    with cluster.one_thread():
        assert predict("slow", folder / "in.zarr", folder / "one.zarr", *OPTIONS) == 0
    return folder / "in.zarr", result(folder / "one.zarr")


@pytest.fixture(scope="module")
def dask_cluster(tmp_path_factory):
    """Two workers of one thread, reached by TLS; certificates are made by openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificates")
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    subprocess.run(
        ["openssl", *made, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    tls = "distributed.comm.tls"
    settings = {f"{tls}.ca-file": certificate, "distributed.scheduler.allowed-failures": 10}
    for role in ("client", "scheduler", "worker"):
        settings |= {f"{tls}.{role}.key": key, f"{tls}.{role}.cert": certificate}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            protocol="tls://",
            security=distributed.security.Security(require_encryption=True),
            dashboard_address="127.0.0.1:0",
        ) as started,
    ):
        yield started


def test_workers_that_are_killed_leave_the_bits_of_one_process(
    volume, dask_cluster, tmp_path, capsys
):
    path, expected = volume
    out, address = tmp_path / "out.zarr", dask_cluster.scheduler_address
    assert address.startswith("tls://")
    chance, killed = random.Random(), []

    def kill() -> None:
        """Twice, a worker is killed while it has a box."""
        done = out.with_name("out.zarr.job") / "done"
        for least in (1, 3):
            while not done.is_dir() or len(list(done.iterdir())) < least:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.2))
            worker = chance.choice([w for w in dask_cluster.workers.values() if w.pid])
            os.kill(worker.pid, signal.SIGKILL)
            killed.append(worker.pid)

    given = [*OPTIONS, "--scheduler", address]
    assert predict("slow", path, out, *given, "--prepare", 8) == 0
    assert "8 boxes" in capsys.readouterr().out
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert predict("slow", path, out, *given) == 0
    killer.join(10)
    assert len(killed) == 2
    assert "8/8 boxes; 0.0 s left" in capsys.readouterr().out
    assert np.array_equal(result(out), expected)
    assert predict("slow", path, out, *given, "--quiet") == 0  # all of it is done
    assert capsys.readouterr().out == ""
    left = dask_cluster.scheduler.worker_plugins  # Dask has some of its own
    assert not [name for name in left if name.startswith("voxfuse")]
    # What a worker raises is the command's error.
    assert predict("slow", path, out, "--patch", 14, "--batch", 4, "--scheduler", address) == 1
    assert "was prepared for another job: " in capsys.readouterr().err


def test_what_workers_raise_is_the_commands_error(
    volume, dask_cluster, tmp_path, capsys, monkeypatch
):
    """They have another folder and do not know the model's types."""
    path, _ = volume
    monkeypatch.chdir(path.parent)
    given = ["--patch", 16, "--scheduler", dask_cluster.scheduler_address, "--foreground"]
    assert predict("slow", path, tmp_path / "out.zarr", *given, path.name, "--prepare", 2) == 0
    assert "2 shards of" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "voxfuse_model_networks")
    assert predict("failing", path, tmp_path / "raised.zarr", *given, "0") == 1
    assert capsys.readouterr().err == "voxfuse predict: NoSuchLayer: deep\n"
    assert predict("lacking", path, tmp_path / "here.zarr", "--patch", 16) == 1
    assert capsys.readouterr().err == "voxfuse predict: the network raised KeyError: 'deep'\n"


def test_a_cluster_that_adapts_starts_a_worker(volume, dask_cluster, tmp_path, capsys, monkeypatch):
    path, _ = volume
    adaptive = dask_cluster.adapt(minimum=0, maximum=1, interval="20ms", wait_count=1)
    try:
        while dask_cluster.scheduler.workers:
            time.sleep(0.05)
        monkeypatch.setattr(cluster.Cluster, "threads", lambda self: [4])  # it has one
        given = ["--prepare", 2, "--scheduler", dask_cluster.scheduler_address]
        given = ["slow", path, tmp_path / "out.zarr", *OPTIONS, *given]
        command = threading.Thread(target=predict, args=given, daemon=True)
        command.start()
        command.join(60)
        assert not command.is_alive()
    finally:
        adaptive.stop()
        dask_cluster.scale(2)
    shown = capsys.readouterr()
    assert "waiting for a worker" in shown.err
    assert "--nthreads 1" in shown.err
    assert shown.out.endswith("2 shards of 96 to 288 patches\nworkers that are there: 1\n")


def test_workers_of_this_machine_listen_to_it_alone(volume, tmp_path, capsys, monkeypatch):
    path, expected = volume
    out, predicts, places = tmp_path / "out.zarr", cluster.Cluster.predict, set()

    def looked_at(self, progress):
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            listening = [c for c in process.net_connections("inet") if c.status == "LISTEN"]
            places.update(c.laddr.ip for c in listening if c.laddr not in before)
        predicts(self, progress)

    before = [c.laddr for c in psutil.Process().net_connections("inet")]
    before += [c.laddr for p in psutil.Process().children(True) for c in p.net_connections("inet")]
    monkeypatch.setattr(cluster.Cluster, "predict", looked_at)
    assert predict("slow", path, out, *OPTIONS, "--workers", 2) == 0
    assert places == {"127.0.0.1"}
    assert re.search(r"2 shards of(.|\n)*/(\d+) boxes; 0.0 s left\n$", capsys.readouterr().out)
    assert np.array_equal(result(out), expected)


def test_what_runs_pickles_is_of_this_machine_or_behind_tls(volume, tmp_path, capsys):
    path, _ = volume
    for options, expected in (
        (["--scheduler", "tcp://10.0.0.1:8786"], r"got tcp://10.0.0.1:8786, expected tls://HOST"),
        (["--scheduler", "head-node:8786"], "a scheduler runs the code of whoever reaches it"),
        (["--workers", "0"], "--workers: got 0, expected a number of processes >= 1"),
        (["--workers", "2", "--shard", "0/2"], "got --shard and --workers, expected one of them"),
        (["--without-tls"], "--without-tls: is for --scheduler"),
        (["--workers", "2", "--memory-limit", "10M"], "fit 10 MB .2 workers of .* fewer --work"),
        (["--memory-limit", "10M"], r"--memory-limit: .* would not fit 10 MB .process .*--batch"),
    ):
        assert predict("slow", path, tmp_path / "out.zarr", *OPTIONS, *options) == 1
        error = capsys.readouterr().err
        assert re.search(expected, error), error
    assert not list(tmp_path.iterdir())
    for address in ("tcp://127.0.0.1:8786", "localhost:8786", "tcp://[::1]:8786"):
        assert cluster._is_here(address)
    assert not cluster._is_here("ucx://127.0.0.1:8786")
    with dask.config.set({"distributed.comm.timeouts.connect": "0.2s"}):
        given = ["--scheduler", "tcp://127.0.0.1:9"]
        assert predict("slow", path, tmp_path / "out.zarr", *OPTIONS, *given) == 1
    assert "--scheduler: tcp://127.0.0.1:9: " in capsys.readouterr().err
    scan = tmp_path / "scan.nii.gz"
    assert predict("slow", scan, tmp_path / "out.nii.gz", *OPTIONS, "--workers", "2") == 1
    assert "--workers: is for a volume in boxes" in capsys.readouterr().err


def test_without_distributed_an_error_says_what_to_install(tmp_path):
    program = (
        "import sys; sys.modules['distributed'] = None; from voxfuse import cli; "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    given = ["--model", f"{NETWORKS}:slow", "--input", "in.zarr", "--output", "out.zarr"]
    ran = subprocess.run(
        [sys.executable, "-c", program, "predict", *given, "--workers", "2"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 1
    assert 'needs distributed: pip install "voxfuse[cluster]"' in ran.stderr
