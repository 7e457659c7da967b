"""The defaults for speed of a rank's process: printed at start, switched off by `--no-tuning`.

They are threads per rank, and the scheduling class and allocator of CPU ranks. None changes what is
computed; another kernel only re-associates sums.

Measured on 2 cores with torch 2.15 (benchmarks/overhead.py and benchmarks/compute.py print it
again): SCHED_BATCH more than halves a short gloo step, channels_last and an allocator that keeps
its memory take a third off a small ResNet's. The fused kernel takes 30 % off SGD's and 60 % off
AdamW's time on the benchmark's MLP.
"""

import contextlib
import ctypes
import os

import torch

from ddp_kit.distributed.topology import Topology, environment

# From malloc.h of glibc.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_THRESHOLD = -3
MIB = 1024 * 1024


def set_threads(topology: Topology, *, threads: int = 0) -> int:
    """Sets torch's CPU threads for this rank.

    Args: `threads` how many; 0: OMP_NUM_THREADS, or cores / ranks on the node.
    Returns: the number.
    """
    count = threads or _share_of_threads(topology)
    torch.set_num_threads(count)
    return count


def _share_of_threads(topology: Topology) -> int:
    # Torchrun sets 1 by itself, whatever the cores.
    stated = environment().get("OMP_NUM_THREADS", "")
    if stated.isdigit() and topology.launcher != "torchrun":
        return int(stated)
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // topology.local_world_size)


def tune_process(topology: Topology, device: torch.device) -> list[str]:
    """Sets this CPU rank's scheduling class and allocator.

    On CUDA ranks, and where the system refuses, it does nothing. It comes before the process group:
    threads inherit the class.

    Returns: what took effect, for the line printed at start.
    """
    if device.type != "cpu":
        return []
    done = []
    # Gloo's hand-overs between threads have tails of 4 ms in the default class.
    if topology.world_size > 1 and hasattr(os, "SCHED_BATCH"):
        # A container may forbid it; it only costs time.
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            done.append("SCHED_BATCH")
    if _keep_freed_memory():
        done.append("allocator keeps freed memory")
    return done


def _keep_freed_memory() -> bool:
    """Asks glibc to keep what activations free, and returns whether it does.

    Else it is given to the system and faulted in again each step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    wanted = {
        M_MMAP_THRESHOLD: 32 * MIB,
        M_TRIM_THRESHOLD: 2048 * MIB - 1,
        M_TOP_PAD: 64 * MIB,
    }
    taken = [mallopt(name, size) for name, size in wanted.items()]
    return all(taken)
