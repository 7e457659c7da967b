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
from torch import nn
from torch._C._autograd import _profiler_enabled
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ddp_kit.distributed.topology import Topology, environment

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
MIB = 1024 * 1024


def set_threads(topology: Topology, *, threads: int = 0) -> int:
    """Sets torch's CPU threads for this rank: `threads`, or cores / ranks on the node. Returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stated = environment().get("OMP_NUM_THREADS", "")
    share = max(1, cores // topology.local_world_size)
    if not threads and stated.isdigit() and topology.launcher != "torchrun":  # torchrun sets 1 by itself, whatever the cores
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
    if topology.world_size > 1 and hasattr(os, "SCHED_BATCH"):  # gloo's hand-overs between threads: 4 ms tails in the default class
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
    return all([mallopt(M_MMAP_THRESHOLD, 32 * MIB), mallopt(M_TRIM_THRESHOLD, 2048 * MIB - 1), mallopt(M_TOP_PAD, 64 * MIB)])


def wants_channels_last(model: nn.Module) -> bool:
    """Whether the model has two-dimensional convolutions, which run faster in that memory format."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def fuse(optimizer: Optimizer) -> bool:
    """Switches one of torch's optimizers to its fused kernel, unless it was built with another or has run. Returns whether it did."""
    groups = optimizer.param_groups
    if type(optimizer) not in (SGD, Adam, AdamW) or optimizer.state:
        return False
    is_chosen = any(group.get(key) is not None for group in groups for key in ("foreach", "fused"))
    is_special = any(group.get("capturable") or group.get("differentiable") or isinstance(group["lr"], torch.Tensor) for group in groups)
    parameters = [parameter for group in groups for parameter in group["params"]]
    if type(optimizer) is SGD and any(hasattr(parameter, "to_local") for parameter in parameters):  # no rule for DTensors in 2.15
        return False
    if is_chosen or is_special or not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters):
        return False
    for group in groups:
        group["fused"] = True
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as its constructor has it for fused=True
    return True


def step_quietly(optimizer: Optimizer) -> None:
    """Steps an optimizer without the wrapper in which torch announces it to profiler and hooks, if neither is there: 20 to 30 us less."""
    announced = type(optimizer).step
    own_hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    is_heard = own_hooks or _global_optimizer_pre_hooks or _global_optimizer_post_hooks or _profiler_enabled()
    if is_heard or not getattr(announced, "hooked", False):
        optimizer.step()
        return
    optimizer._opt_called = True  # type: ignore[attr-defined]  # as torch's schedulers note a step
    announced.__wrapped__(optimizer)  # type: ignore[attr-defined]  # functools.wraps sets it
