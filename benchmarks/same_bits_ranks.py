"""Ranks of `python -m ddp_kit.train`, forked from a process that has imported torch.

That takes a tenth of the time.

Each gets the variables that torchrun would set, and runs the module as the main one.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

MODULE = "ddp_kit.train"
# nothing of ddp_kit: what is imported when, is for it to say
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.optim",
    "torchvision",
    "sklearn.datasets",
    "tyro",
    "safetensors.torch",
]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(PRELOADED)


def _rank(args: Sequence[str], folder: str, environ: Mapping[str, str], out: str, err: str) -> None:
    for path, stream in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    # where the caller forbids it, each start would compile everything anew
    sys.dont_write_bytecode = False
    sys.argv = [MODULE, *args]
    sys.path[0] = folder
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def _facts(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Returns what torchrun tells a rank; nothing for a single one, which is a plain process."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def train(
    args: Sequence[str],
    *,
    ranks: int,
    folder: Path,
    environ: Mapping[str, str],
    texts: Path,
    limit_s: float,
) -> tuple[list[int], str, str]:
    """Runs the command on `ranks` ranks in `folder`.

    Those that last longer than `limit_s` seconds are killed.

    `texts` is a folder, made here, for the files into which all ranks write.
    Returns exit codes by rank (-9: killed), stdout and stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    texts.mkdir()
    out = texts / "out"
    err = texts / "err"
    processes = []
    for rank in range(ranks):
        own = {**environ, **_facts(rank, ranks, port)}
        process = FORKS.Process(target=_rank, args=(args, str(folder), own, str(out), str(err)))
        process.start()
        processes.append(process)
    end = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes]
    return codes, out.read_text(errors="replace"), err.read_text(errors="replace")
