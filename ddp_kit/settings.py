"""What can be changed about a run from outside: plain data, one field a flag.

A field's line says all that is known of it: its default, the task it belongs to in `--help`, the
values it may have, whether a later attempt may change it, and what other frameworks call it.
`config` reads these rules; behaviour is none of a setting's business, and what a model or a loss is
belongs to the recipe's function.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any, Literal

from ddp_kit.config.groups import DeepSpeed as DeepSpeed
from ddp_kit.config.groups import EarlyStop as EarlyStop
from ddp_kit.config.groups import Fsdp as Fsdp
from ddp_kit.config.groups import Hang as Hang
from ddp_kit.config.groups import Wandb as Wandb
from ddp_kit.config.rules import rule
from ddp_kit.errors import ConfigError

Precision = Literal["fp32", "fp64", "tf32", "bf16", "fp16"]
Comm = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The fields every recipe has. A recipe's own Settings inherits them and sets its defaults."""

    global_batch: int = field(default=0, metadata=rule("batch", least=0))
    """samples per optimizer step, over all ranks"""
    micro_batch: int | Literal["auto"] = field(
        default=0,
        metadata=rule(
            "batch", least=0, expected="at least 1 sample, or 0 for a rank's whole share"
        ),
    )
    """at most so many samples in one forward pass of a rank; 0: the rank's whole share; auto: tried
    out before training"""
    epochs: int = field(
        default=0,
        metadata=rule("length", least=0, elsewhere=("--num-train-epochs", "--max-epochs")),
    )
    """passes over the training data; 0: as max_steps says"""
    max_steps: int = field(default=0, metadata=rule("length", least=0))
    """optimizer steps; beside epochs it only stops earlier; 0: as epochs says"""
    seed: int = field(
        default=0, metadata=rule("reproducibility", least=0, below=2**63, expected="0 to 2^63 - 1")
    )
    """the only source of randomness"""
    precision: Precision = field(default="fp32", metadata=rule("precision"))
    """arithmetic of the forward pass; weights and optimizer state stay fp32 (fp64 with fp64)"""
    strategy: Literal["ddp", "zero1", "fsdp", "deepspeed"] = field(
        default="ddp", metadata=rule("strategy", free=True)
    )
    """how the model is spread over ranks: ddp (whole on each), zero1 (optimizer state split), fsdp
    (all split), deepspeed"""
    fsdp: Fsdp = field(default_factory=Fsdp, metadata=rule("strategy", free=True))
    deepspeed: DeepSpeed = field(default_factory=DeepSpeed, metadata=rule("strategy", free=True))
    comm: Comm = field(default="fp32", metadata=rule("precision"))
    """precision in which gradients travel with ddp and zero1; fp32: as they are"""
    grad_clip: float = field(
        default=0.0,
        metadata=rule(
            "optimization", least=0, elsewhere=("--max-grad-norm", "--gradient-clip-val")
        ),
    )
    """largest global gradient norm; 0 is off"""
    on_nonfinite: Literal["stop", "skip", "rollback"] = field(
        default="stop", metadata=rule("when a step is bad", free=True)
    )
    """at a loss or gradient that is inf or nan: end the run; leave the step out; or go back to the
    last checkpoint and leave it out"""
    on_spike: Literal["off", "stop", "skip", "rollback"] = field(
        default="off", metadata=rule("when a step is bad")
    )
    """the same at a gradient norm far above those of the steps before"""
    spike_z: float = field(
        default=20.0, metadata=rule("when a step is bad", least=1, expected="at least 1")
    )
    """how many robust deviations above the median of the steps before are a spike"""
    spike_window: int = field(
        default=100, metadata=rule("when a step is bad", least=8, expected="at least 8 steps")
    )
    """over how many steps; none is judged before there are so many"""
    max_dropped: int = field(
        default=10,
        metadata=rule("when a step is bad", least=1, expected="at least 1 step", free=True),
    )
    """steps that a run may leave out in all; one more ends it"""
    check_every: int = field(default=500, metadata=rule("when a step is bad", least=0, free=True))
    """optimizer steps between looks whether all ranks hold the same weights; also at every save and
    evaluation; 0: only there"""
    sdc_check: int = field(default=0, metadata=rule("when a step is bad", least=0, free=True))
    """optimizer steps between computing a micro-batch twice, to find a chip that miscalculates; 0
    is off"""
    eval_every: int = field(default=0, metadata=rule("evaluation", least=0, free=True))
    """optimizer steps between evaluations; also at every epoch's end; 0: only there"""
    log_every: int = field(
        default=10, metadata=rule("tracking", least=1, expected="at least 1 step", free=True)
    )
    """optimizer steps between training records"""
    save_every: int = field(default=0, metadata=rule("saving", least=0, free=True))
    """optimizer steps between checkpoints; also at every epoch's end; 0: only there"""
    save_minutes: float = field(default=30.0, metadata=rule("saving", least=0, free=True))
    """a checkpoint at least this often by wall time; 0 is off"""
    max_hours: float = field(
        default=0.0, metadata=rule("stopping", least=0, free=True, elsewhere=("--max-time",))
    )
    """wall time after which a life of the run saves and stops; 0 is off"""
    hang_timeout: float = field(default=0.0, metadata=rule("stopping", least=0, free=True))
    """seconds without progress that are a hang; 0: 10 times the slowest step, at least 60"""
    hang: Hang = field(default_factory=Hang, metadata=rule("stopping", free=True))
    keep: int = field(
        default=3, metadata=rule("saving", least=1, expected="at least 1 checkpoint", free=True)
    )
    """newest checkpoints that stay, beside the best one"""
    keep_every: int = field(default=0, metadata=rule("saving", least=0, free=True))
    """checkpoints at multiples of this step stay for ever; 0 is off"""
    save_trainable_only: bool = field(default=False, metadata=rule("saving"))
    """leave frozen weights out of checkpoints (adapters); their hash is recorded"""
    resume: str = field(default="auto", metadata=rule("resuming", free=True))
    """auto: the newest good checkpoint in the run directory; never: refuse a used one; or a run or
    checkpoint to go on from"""
    resume_data: Literal["state", "restart"] = field(
        default="state", metadata=rule("resuming", free=True)
    )
    """iterable data with a state of its own: go on from it, or read from the start again (any
    number of ranks)"""
    change: tuple[str, ...] = field(default=(), metadata=rule("resuming", free=True))
    """settings that may differ from the checkpoint's: --change lr"""
    init_from: str = field(default="", metadata=rule("resuming", free=True))
    """start from weights only: a run, a checkpoint, a .safetensors file or a folder of them"""
    init_partial: bool = field(default=False, metadata=rule("resuming", free=True))
    """take of --init-from what fits, and show a table of what does not; the rest keeps its initial
    values"""
    rename: tuple[str, ...] = field(default=(), metadata=rule("resuming", free=True))
    """old=new: tensors of --init-from that have another name in this model"""
    early_stop: EarlyStop = field(default_factory=EarlyStop, metadata=rule("stopping"))
    exact: bool = field(default=False, metadata=rule("reproducibility"))
    """the same bits at any number of ranks that fits; needs a stated micro_batch"""
    compile: bool = field(default=False, metadata=rule("speed and memory", free=True))
    """compile the model with torch.compile"""
    activation_checkpointing: str = field(default="", metadata=rule("speed and memory"))
    """class name of the modules whose activations are computed again in backward; empty is off"""
    ema: float = field(
        default=0.0,
        metadata=rule(
            "optimization",
            least=0,
            below=1,
            expected="a decay from 0 (off) to below 1, for instance 0.999",
        ),
    )
    """decay of an exponential moving average of the weights, which evaluation then uses; 0 is
    off"""
    sync_batchnorm: bool = field(default=False, metadata=rule("strategy"))
    """normalise over the micro-batches of all ranks (CUDA only)"""
    find_unused_parameters: bool = field(default=False, metadata=rule("strategy", free=True))
    """let parameters go without a gradient in some steps"""
    num_workers: int = field(
        default=0,
        metadata=rule(
            "speed and memory", least=0, free=True, elsewhere=("--dataloader-num-workers",)
        ),
    )
    """loader processes per rank; 0: the training process reads"""
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata=rule("speed and memory", free=True)
    )
    """where to train; auto: CUDA where there is one"""
    threads: int = field(default=0, metadata=rule("speed and memory", least=0, free=True))
    """CPU threads per rank; 0: cores / ranks on the node"""
    tuning: bool = field(default=True, metadata=rule("speed and memory", free=True))
    """the defaults for speed that are printed at start (channels_last, fused optimizer; on CPU:
    scheduling class, allocator)"""
    tracker: tuple[Literal["wandb", "tensorboard"], ...] = field(
        default=(), metadata=rule("tracking", free=True)
    )
    """where to send metrics beside the console and JSONL"""
    wandb: Wandb = field(default_factory=Wandb, metadata=rule("tracking", free=True))
    run_dir: str = field(
        default="",
        metadata=rule("saving", free=True, elsewhere=("--output-dir", "--default-root-dir")),
    )
    """where the run lives; empty: runs/<recipe>-<UTC time>"""


def flag(name: str) -> str:
    """Returns the flag of a field."""
    return "--" + name.replace("_", "-")


def to_json(settings: Settings) -> dict[str, Any]:
    """Returns the fields as JSON values; `--settings` reads them back.

    Raises: ConfigError if a field of the recipe's own holds what JSON has no form for.
    """
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=_as_text))
    return values


def _as_text(value: object) -> str:
    """Returns the text of what JSON does not know: a path, or an enum's name."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PurePath):
        return str(value)
    raise ConfigError(
        f"a field of Settings holds a {type(value).__name__};"
        " expected numbers, texts, paths, enums, or tuples of them."
    )


def flatten(settings: Settings) -> dict[str, str]:
    """Returns every field, nested ones as `group.field`, with its JSON text."""
    result: dict[str, str] = {}
    for name, value in to_json(settings).items():
        if isinstance(value, dict):
            for inner, content in value.items():
                result[f"{name}.{inner}"] = json.dumps(content)
        else:
            result[name] = json.dumps(value)
    return result


def digest(text: str) -> int:
    """Returns 63 bits of SHA-256 of a text, to compare it between ranks."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
