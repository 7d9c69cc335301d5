"""Run checks in several gloo processes on this machine."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

Check = Callable[[int, int], None]


def run(rank: int, world: int, folder: str, checks: tuple[Check, ...]) -> None:
    """One rank: call every check with (rank, world); leave a traceback in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    try:
        for check in checks:
            check(rank, world)
        # No rank tears its connections down while another still uses them.
        dist.barrier()
    except BaseException:
        Path(folder, f"error{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def launch(world: int, folder: Path, checks: tuple[Check, ...]) -> None:
    """Run ``checks`` (functions of a module) in ``world`` processes; fail with their tracebacks."""
    # A process that has imported PyTorch once, and nothing else, is forked for every rank; they end
    # without the destructors of C++, which abort where a thread of FSDP's still runs.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "voxfuse"])
    processes = [
        context.Process(target=run, args=(rank, world, str(folder), checks))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    errors = [path.read_text() for path in sorted(folder.glob("error*"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes)
