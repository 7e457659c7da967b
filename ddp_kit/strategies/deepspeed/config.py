"""DeepSpeed's configuration: what follows from our flags, and a file for the rest.

Keys of the file that flags or the recipe decide already are refused: there is one source of truth.
So are keys that DeepSpeed does not know, which it would pass over in silence.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.settings import DeepSpeed

GATHERED_WEIGHTS = "ddp_kit: averaged and restored weights must be the ones that are gathered"
ONE_ROOT = "ddp_kit, whose root it would make one. Name leaf_module"
CLIPS_ON_DEVICE = (
    "ddp_kit: it clips gradients on the device. For less memory type --deepspeed.stage 3"
)
READS_ON_DEVICE = (
    "ddp_kit: checkpoints read weights on the device. Type --strategy fsdp --fsdp.cpu-offload"
)
FROZEN_AS_THEY_ARE = "ddp_kit: checkpoints hold weights as they are, frozen ones too"
ONE_SET = "ddp_kit: all ranks share one set of partitions. Type --strategy fsdp --fsdp.hybrid"
# Key in the file -> what decides it.
DECIDED = {
    "train_batch_size": "--global-batch",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--global-batch and --micro-batch",
    "managed_gradient_accumulation": "--global-batch and --micro-batch",
    "elasticity": "--global-batch",
    "gradient_clipping": "--grad-clip",
    "gradient_allreduce_op": "the count that the loss returns",
    "fp16": "--precision",
    "bf16": "--precision",
    "bfloat16": "--precision",
    "amp": "--precision",
    "torch_autocast": "--precision",
    "data_types": "--precision",
    "optimizer": "the recipe's optimizer",
    "scheduler": "the recipe's scheduler",
    "zero_allow_untested_optimizer": "the recipe's optimizer",
    "zero_force_ds_cpu_optimizer": "the recipe's optimizer",
    "activation_checkpointing": "--activation-checkpointing",
    "compile": "--compile",
    "checkpoint": "--save-every and --keep: checkpoints are ddp_kit's own",
    "load_universal_checkpoint": "--resume: checkpoints are ddp_kit's own",
    "data_efficiency": "the recipe's train_data",
    "curriculum_learning": "the recipe's train_data",
    "dataloader_drop_last": "the recipe's train_data",
    "tensorboard": "--tracker",
    "wandb": "--tracker",
    "csv_monitor": "--tracker",
    "comet": "--tracker",
    "tensor_parallel": "the launcher: all ranks share the data",
    "sequence_parallel_size": "the launcher: all ranks share the data",
    "data_parallel_size": "the launcher: all ranks share the data",
    "pipeline": "the launcher: all ranks share the data",
    "expert_parallel": "the launcher: all ranks share the data",
    "use_data_before_expert_parallelism": "the launcher: all ranks share the data",
    "seq_parallel_communication_data_type": "the launcher: all ranks share the data",
    "hybrid_engine": "ddp_kit, which trains and does not serve",
    "weight_quantization": "ddp_kit, which trains and does not serve",
    "datastates_ckpt": "--save-every and --keep: checkpoints are ddp_kit's own",
    "autotuning": "the flags themselves",
    "zero_optimization.stage": "--deepspeed.stage",
    "zero_optimization.compute_grad_norm": "--grad-clip",
    "zero_optimization.stage3_param_persistence_threshold": GATHERED_WEIGHTS,
    "zero_optimization.param_persistence_threshold": GATHERED_WEIGHTS,
    "zero_optimization.stage3_module_granularity_threshold": ONE_ROOT,
    "zero_optimization.module_granularity_threshold": ONE_ROOT,
    "zero_optimization.parameter_alignment": "ddp_kit: checkpoints hold no padding",
    "zero_optimization.offload_optimizer": CLIPS_ON_DEVICE,
    "zero_optimization.offload_param": READS_ON_DEVICE,
    "zero_optimization.cpu_offload": CLIPS_ON_DEVICE,
    "zero_optimization.cpu_offload_param": READS_ON_DEVICE,
    "zero_optimization.zero_quantized_nontrainable_weights": FROZEN_AS_THEY_ARE,
    "zero_optimization.mics_shard_size": ONE_SET,
    "zero_optimization.zenflow": "ddp_kit: every step takes the whole gradient",
}


@final
class WatchedConfig(dict[str, Any]):
    """A configuration that notes what DeepSpeed looks for in it, from which follows what it
    knows."""

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        self._sought: set[object] = set()

    def __getitem__(self, key: str) -> Any:
        self._sought.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._sought.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Returns what a dict does."""
        self._sought.add(key)
        return super().get(key, default)

    def require_known(self, path: str) -> None:
        """Raises: ConfigError for keys of the file at `path` that were never looked for."""
        known = {*map(str, self._sought), *DECIDED}
        unknown = []
        for key in self:
            if key in known:
                continue
            near = nearest(key, known)
            hint = f" (did you mean {near!r}?)" if near else ""
            unknown.append(f"{key!r}{hint}")
        if unknown:
            raise ConfigError(
                f"--deepspeed.config {path}: DeepSpeed knows no {', '.join(unknown)} and would "
                "pass over it. Take it out, or mend it."
            )


def config_of(settings: DeepSpeed) -> dict[str, Any]:
    """Returns what `deepspeed.initialize` is given.

    Raises: ConfigError for a file that cannot be read, and for all of its keys that something else
        decides.
    """
    config = _read(settings.config) if settings.config else {}
    _refuse_decided(config, settings.config)
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.stage in (1, 2):
        # The norm is taken before.
        zero["compute_grad_norm"] = False
    if settings.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        **config,
        # Of no effect: the boundary between steps is set by hand.
        "train_micro_batch_size_per_gpu": 1,
        # Else it would divide the loss.
        "gradient_accumulation_steps": 1,
        # The default is 1.
        "gradient_clipping": 0.0,
        "zero_optimization": {**config.get("zero_optimization", {}), **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _refuse_decided(config: Mapping[str, Any], path: str) -> None:
    """Raises: ConfigError for keys that something else decides, or that are left to others."""
    decided = []
    automatic = []
    for key, value in _flat(config).items():
        if key in DECIDED:
            decided.append(f"  {key}: {json.dumps(value)[:60]}   decided by {DECIDED[key]}")
        elif value == "auto":
            automatic.append(key)
    if decided:
        head = f"--deepspeed.config {path}: take these out, which something else decides:"
        raise ConfigError("\n".join([head, *decided]))
    if automatic:
        raise ConfigError(
            f'--deepspeed.config {path}: {some(automatic)}: "auto" is for others to fill in. '
            "Type a value, or leave it out."
        )


def _read(path: str) -> dict[str, Any]:
    """Raises: ConfigError for a file that cannot be read, or is no JSON object."""
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"--deepspeed.config {path}: {error.strerror}. Expected a JSON file with DeepSpeed's "
            "settings."
        ) from error
    except ValueError as error:
        raise ConfigError(f"--deepspeed.config {path}: this is no JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise ConfigError(
            f"--deepspeed.config {path}: expected a JSON object, for instance "
            '{"zero_optimization": {"overlap_comm": true}}.'
        )
    return config


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with what stands below `zero_optimization` beside the rest."""
    flat = dict(config)
    for key, value in config.get("zero_optimization", {}).items():
        flat[f"zero_optimization.{key}"] = value
    return flat
