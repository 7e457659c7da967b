"""The defaults for speed, in one place: printed at start, switched off by `--no-tuning`.

Owns: threads per rank, the scheduling class and allocator of CPU ranks, the memory format of convolutional models, fused optimizers.
Refuses: anything that changes what is computed; another kernel only re-associates sums.

Measured on 2 cores with torch 2.15 (benchmarks/overhead.py and benchmarks/compute.py print it again): SCHED_BATCH more than halves
a short gloo step, channels_last and an allocator that keeps its memory take a third off a small ResNet's. The fused kernel takes 30 % off
SGD's and 60 % off AdamW's time on the benchmark's MLP.
"""

import ctypes
import os

import torch

from ddp_kit.distributed.topology import Topology, environment

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
MIB = 1024 * 1024


def set_threads(topology: Topology, *, threads: int = 0) -> int:
    """Sets torch's CPU threads for this rank: `threads`, or cores / ranks on the node. Returns the number."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    stated = environment().get("OMP_NUM_THREADS", "")
    share = max(1, cores // topology.local_world_size)
    if (
        not threads and stated.isdigit() and topology.launcher != "torchrun"
    ):  # torchrun sets 1 by itself, whatever the cores
        share = int(stated)
    torch.set_num_threads(threads or share)
    return threads or share


def tune_process(topology: Topology, device: torch.device) -> list[str]:
    """Sets this CPU rank's scheduling class and allocator. Returns what took effect, for the line printed at start.

    On CUDA ranks, and where the system refuses, it does nothing. It comes before the process group: threads inherit the class.
    """
    if device.type != "cpu":
        return []
    done = []
    if topology.world_size > 1 and hasattr(
        os, "SCHED_BATCH"
    ):  # gloo's hand-overs between threads: 4 ms tails in the default class
        try:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
            done.append("SCHED_BATCH")
        except OSError:  # a container may forbid it; it only costs time
            pass
    if _keep_freed_memory():
        done.append("allocator keeps freed memory")
    return done


def _keep_freed_memory() -> bool:
    """Asks glibc to keep what activations free, instead of giving it to the system and faulting it in again each step."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return all(
        [
            mallopt(M_MMAP_THRESHOLD, 32 * MIB),
            mallopt(M_TRIM_THRESHOLD, 2048 * MIB - 1),
            mallopt(M_TOP_PAD, 64 * MIB),
        ]
    )
