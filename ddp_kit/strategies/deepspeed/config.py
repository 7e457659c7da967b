"""DeepSpeed's configuration: what follows from our flags, and a file for the rest.

Owns: which of DeepSpeed's keys flags and recipe decide already, or have no effect here.
Refuses: a second source of truth, and keys that DeepSpeed does not know and would pass over. Both are named.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.settings import DeepSpeed

DECIDED = {  # key in the file -> what decides it
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
    "zero_optimization.stage3_param_persistence_threshold": "ddp_kit: averaged and restored weights must be the ones that are gathered",
    "zero_optimization.param_persistence_threshold": "ddp_kit: averaged and restored weights must be the ones that are gathered",
    "zero_optimization.stage3_module_granularity_threshold": "ddp_kit, whose root it would make one. Name leaf_module",
    "zero_optimization.module_granularity_threshold": "ddp_kit, whose root it would make one. Name leaf_module",
    "zero_optimization.parameter_alignment": "ddp_kit: checkpoints hold no padding",
    "zero_optimization.offload_optimizer": "ddp_kit: it clips gradients on the device. For less memory type --deepspeed.stage 3",
    "zero_optimization.offload_param": "ddp_kit: checkpoints read weights on the device. Type --strategy fsdp --fsdp.cpu-offload",
    "zero_optimization.cpu_offload": "ddp_kit: it clips gradients on the device. For less memory type --deepspeed.stage 3",
    "zero_optimization.cpu_offload_param": "ddp_kit: checkpoints read weights on the device. Type --strategy fsdp --fsdp.cpu-offload",
    "zero_optimization.zero_quantized_nontrainable_weights": "ddp_kit: checkpoints hold weights as they are, frozen ones too",
    "zero_optimization.mics_shard_size": "ddp_kit: all ranks share one set of partitions. Type --strategy fsdp --fsdp.hybrid",
    "zero_optimization.zenflow": "ddp_kit: every step takes the whole gradient",
}


@final
class Noted(dict[str, Any]):
    """A configuration that notes what DeepSpeed looks for in it, from which follows what it knows."""

    def __init__(self, content: Mapping[str, Any]):
        super().__init__(content)
        self._sought = set[object]()

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
        unknown = [(key, nearest(key, known)) for key in self if key not in known]
        if unknown:
            named = ", ".join(
                f"{key!r}{f' (did you mean {near!r}?)' if near else ''}" for key, near in unknown
            )
            raise ConfigError(
                f"--deepspeed.config {path}: DeepSpeed knows no {named} and would pass over it. Take it out, or mend it."
            )


def config_of(settings: DeepSpeed) -> dict[str, Any]:
    """Returns what `deepspeed.initialize` is given.

    Raises: ConfigError for a file that cannot be read, and for all of its keys that something else decides.
    """
    config = _read(settings.config) if settings.config else {}
    faults = [
        f"  {key}: {json.dumps(value)[:60]}   decided by {DECIDED[key]}"
        for key, value in _flat(config).items()
        if key in DECIDED
    ]
    unset = [key for key, value in _flat(config).items() if value == "auto" and key not in DECIDED]
    if faults:
        raise ConfigError(
            "\n".join(
                [
                    f"--deepspeed.config {settings.config}: take these out, which something else decides:",
                    *faults,
                ]
            )
        )
    if unset:
        raise ConfigError(
            f'--deepspeed.config {settings.config}: {some(unset)}: "auto" is for others to fill in. Type a value, or leave it out.'
        )
    zero: dict[str, Any] = {"stage": settings.stage}
    if settings.stage in (1, 2):
        zero["compute_grad_norm"] = False  # it is taken before
    if settings.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0
    return {
        **config,
        "train_micro_batch_size_per_gpu": 1,  # of no effect: the boundary between steps is set by hand
        "gradient_accumulation_steps": 1,  # else it would divide the loss
        "gradient_clipping": 0.0,  # the default is 1
        "zero_optimization": {**config.get("zero_optimization", {}), **zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _read(path: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(
            f"--deepspeed.config {path}: {error.strerror}. Expected a JSON file with DeepSpeed's settings."
        ) from error
    except ValueError as error:
        raise ConfigError(f"--deepspeed.config {path}: this is no JSON: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("zero_optimization", {}), dict):
        raise ConfigError(
            f'--deepspeed.config {path}: expected a JSON object, for instance {{"zero_optimization": {{"overlap_comm": true}}}}.'
        )
    return config


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    inner = config.get("zero_optimization", {})
    return {**config, **{f"zero_optimization.{key}": value for key, value in inner.items()}}
