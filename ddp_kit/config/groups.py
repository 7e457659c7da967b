"""Flags that belong together, as groups of fields: `--early-stop.metric`, `--fsdp.wrap`."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """Stopping early on an evaluation metric. Off while `metric` is empty."""

    metric: str = ""
    """evaluation metric to watch, for instance loss or accuracy; empty is off"""
    patience: int = 5
    """evaluations without an improvement before the run stops"""
    min_delta: float = 0.0
    """smallest change that counts as an improvement"""
    mode: Literal["min", "max"] = "min"
    """whether smaller or larger is better"""


@dataclass(frozen=True, kw_only=True)
class Hang:
    """Seconds without progress after which a rank is taken to hang, by what it does."""

    enabled: bool = True
    """name what hangs and end the run"""
    start: float = 1800.0
    """before the first step: model, data, resuming, on_start"""
    first_step: float = 600.0
    """in the first step of an attempt, which may compile"""
    callback: float = 600.0
    """in a callback, or what a loop of one's own does between steps"""
    evaluation: float = 1800.0
    """in one micro-batch of an evaluation, or in summarize and samples"""
    save: float = 1800.0
    """in a save, which waits for the one before it"""
    end: float = 1800.0
    """after the last step: hashes, on_end, trackers"""


@dataclass(frozen=True, kw_only=True)
class Wandb:
    """Weights & Biases; used with --tracker wandb."""

    project: str = ""
    """project; empty: ddp_kit"""
    entity: str = ""
    """team or user; empty: the account's default"""
    group: str = ""
    """group of runs"""
    tags: tuple[str, ...] = ()
    """tags of the run"""
    mode: Literal["", "online", "offline"] = ""
    """empty: online where a key is found, else offline"""


@dataclass(frozen=True, kw_only=True)
class Fsdp:
    """FSDP2; used with --strategy fsdp."""

    wrap: tuple[str, ...] = ()
    """class names of the modules that are gathered as one; empty: the whole model is"""
    wrap_size: int = 0
    """also the smallest modules with at least so many parameters; 0 is off"""
    hybrid: bool = False
    """split within a node, repeat across nodes"""
    cpu_offload: bool = False
    """keep weights, gradients and optimizer state in host memory (CUDA only)"""
    meta: bool = False
    """build the model without memory and give it values once it is split: by reset_parameters,
    --init-from or a checkpoint"""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """DeepSpeed; used with --strategy deepspeed."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 nothing is split, 1 optimizer state, 2 gradients too, 3 weights too"""
    config: str = ""
    """JSON file of further DeepSpeed settings; what flags decide may not stand in it"""
