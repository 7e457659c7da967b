"""What can be changed about a run from outside: plain data, one field a flag.

Owns: the fields every recipe has and their JSON form. `faults` checks them.
Refuses: behaviour. What a model or a loss is belongs to the recipe's function.
"""

import dataclasses
import hashlib
import json
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal

from ddp_kit.errors import ConfigError

Precision = Literal["fp32", "fp64", "tf32", "bf16", "fp16"]
Comm = Literal["fp32", "bf16", "fp16"]


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
    """build the model without memory and give it values once it is split: by reset_parameters, --init-from or a checkpoint"""


@dataclass(frozen=True, kw_only=True)
class DeepSpeed:
    """DeepSpeed; used with --strategy deepspeed."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 nothing is split, 1 optimizer state, 2 gradients too, 3 weights too"""
    config: str = ""
    """JSON file of further DeepSpeed settings; what flags decide may not stand in it"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields every recipe has. A recipe's own Settings inherits them and sets its defaults."""

    global_batch: int = 0
    """samples per optimizer step, over all ranks"""
    micro_batch: int | Literal["auto"] = 0
    """at most so many samples in one forward pass of a rank; 0: the rank's whole share; auto: tried out before training"""
    epochs: int = 0
    """passes over the training data; 0: as max_steps says"""
    max_steps: int = 0
    """optimizer steps; beside epochs it only stops earlier; 0: as epochs says"""
    seed: int = 0
    """the only source of randomness"""
    precision: Precision = "fp32"
    """arithmetic of the forward pass; weights and optimizer state stay fp32 (fp64 with fp64)"""
    strategy: Literal["ddp", "zero1", "fsdp", "deepspeed"] = "ddp"
    """how the model is spread over ranks: ddp (whole on each), zero1 (optimizer state split), fsdp (all split), deepspeed"""
    fsdp: Fsdp = field(default_factory=Fsdp)
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed)
    comm: Comm = "fp32"
    """precision in which gradients travel with ddp and zero1; fp32: as they are"""
    grad_clip: float = 0.0
    """largest global gradient norm; 0 is off"""
    eval_every: int = 0
    """optimizer steps between evaluations; also at every epoch's end; 0: only there"""
    log_every: int = 10
    """optimizer steps between training records"""
    save_every: int = 0
    """optimizer steps between checkpoints; also at every epoch's end; 0: only there"""
    save_minutes: float = 30.0
    """a checkpoint at least this often by wall time; 0 is off"""
    max_hours: float = 0.0
    """wall time after which a life of the run saves and stops; 0 is off"""
    keep: int = 3
    """newest checkpoints that stay, beside the best one"""
    keep_every: int = 0
    """checkpoints at multiples of this step stay for ever; 0 is off"""
    save_trainable_only: bool = False
    """leave frozen weights out of checkpoints (adapters); their hash is recorded"""
    resume: str = "auto"
    """auto: the newest good checkpoint in the run directory; never: refuse a used one; or a run or checkpoint to go on from"""
    resume_data: Literal["state", "restart"] = "state"
    """iterable data with a state of its own: go on from it, or read from the start again (any number of ranks)"""
    change: tuple[str, ...] = ()
    """settings that may differ from the checkpoint's: --change lr"""
    init_from: str = ""
    """start from weights only: a run, a checkpoint, a .safetensors file or a folder of them"""
    init_partial: bool = False
    """take of --init-from what fits, and show a table of what does not; the rest keeps its initial values"""
    rename: tuple[str, ...] = ()
    """old=new: tensors of --init-from that have another name in this model"""
    early_stop: EarlyStop = field(default_factory=EarlyStop)
    exact: bool = False
    """the same bits at any number of ranks that fits; needs a stated micro_batch"""
    compile: bool = False
    """compile the model with torch.compile"""
    activation_checkpointing: str = ""
    """class name of the modules whose activations are computed again in backward; empty is off"""
    ema: float = 0.0
    """decay of an exponential moving average of the weights, which evaluation then uses; 0 is off"""
    sync_batchnorm: bool = False
    """normalise over the micro-batches of all ranks (CUDA only)"""
    find_unused_parameters: bool = False
    """let parameters go without a gradient in some steps"""
    num_workers: int = 0
    """loader processes per rank; 0: the training process reads"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto: CUDA where there is one"""
    threads: int = 0
    """CPU threads per rank; 0: cores / ranks on the node"""
    tuning: bool = True
    """the defaults for speed that are printed at start (channels_last, fused optimizer; on CPU: scheduling class, allocator)"""
    tracker: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """where to send metrics beside the console and JSONL"""
    wandb: Wandb = field(default_factory=Wandb)
    run_dir: str = ""
    """where the run lives; empty: runs/<recipe>-<UTC time>"""


def flag(name: str) -> str:
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def to_json(settings: Settings) -> dict[str, Any]:
    """Returns the fields as JSON values; `--settings` reads them back."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=_as_text))
    return values


def _as_text(value: object) -> str:
    """Returns the text of what JSON does not know: a path, or an enum's name."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    raise ConfigError(
        f"a field of Settings holds a {type(value).__name__}; expected numbers, texts, paths, enums, or tuples of them."
    )


def fits(value: Any, hint: Any) -> bool:
    """Whether a value, as TOML or JSON has it, fits a field's type."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        kinds = (
            inner[:1] * len(value)
            if inner[1:] == (...,) and isinstance(value, (list, tuple))
            else inner
        )
        return (
            isinstance(value, (list, tuple))
            and len(kinds) == len(value)
            and all(map(fits, value, kinds))
        )
    if origin in (list, dict):
        return isinstance(value, origin)
    if inner:  # a union
        return any(fits(value, kind) for kind in inner)
    if hint is float:
        return (isinstance(value, (int, float)) and not isinstance(value, bool)) or value in (
            "inf",
            "-inf",
            "nan",
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint) or value in hint.__members__
    if isinstance(hint, type) and issubclass(hint, PurePath):
        return isinstance(value, (str, PurePath))
    return not isinstance(hint, type) or isinstance(value, hint)


def converted(value: Any, hint: Any) -> Any:
    """Returns a TOML or JSON value that fits as the field's type has it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        return tuple(converted(item, kind) for item, kind in zip(value, kinds, strict=True))
    if inner and origin not in (list, dict, Literal):
        return converted(value, next(kind for kind in inner if fits(value, kind)))
    if hint is float or (isinstance(hint, type) and issubclass(hint, PurePath)):
        return hint(value)
    if isinstance(hint, type) and issubclass(hint, Enum) and isinstance(value, str):
        return hint[value]
    return value


def flatten(settings: Settings) -> dict[str, str]:
    """Returns every field, nested ones as `group.field`, with its JSON text."""
    result: dict[str, str] = {}
    for name, value in to_json(settings).items():
        if isinstance(value, dict):
            result |= {f"{name}.{inner}": json.dumps(content) for inner, content in value.items()}
        else:
            result[name] = json.dumps(value)
    return result


def digest(text: str) -> int:
    """Returns 63 bits of SHA-256 of a text, to compare it between ranks."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
