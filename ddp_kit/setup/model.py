"""From a recipe and its settings to the model on this rank's device, and its batches' placement."""

import functools
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddp_kit.checkpoint.init_from import load_weights
from ddp_kit.data.seeding import Purpose, generators_put_back, key, seed_generators
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.io.logs import logger
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings
from ddp_kit.setup.frozen_words import freeze_for_good
from ddp_kit.strategies.precision import placed, weight_dtype
from ddp_kit.training.ema import is_weight


def build_model(
    recipe: Recipe, settings: Settings, group: Group, *, takes_all: bool = False
) -> nn.Module:
    """Returns the model on this rank's device. Every rank calls it.

    Its weights depend on the seed alone, or on `init_from`. With `--strategy fsdp` over several
    ranks it stays in host memory, or on the meta device with `--fsdp.meta`: the strategy moves it,
    part by part.

    Args: `takes_all` of what `init_from` holds of the model, not its weights alone.
    Raises: ConfigError for a model that is none or has no shapes yet, and for flags that do not fit
        it or this rank's device.
    """
    is_split = settings.strategy == "fsdp" and group.world_size > 1
    is_meta = is_split and settings.fsdp.meta
    model = _fresh_model(recipe, seed=settings.seed, is_meta=is_meta)
    if settings.init_from and not is_meta:
        load_first_weights(model, settings, group, takes_all=takes_all)
    _check_device(settings, group)
    if settings.sync_batchnorm:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group.pg)
    device: torch.device | str = group.device
    if is_meta:
        device = "meta"
    elif is_split:
        device = "cpu"
    if group.rank == 0:
        _note_other_dtypes(model, settings)
    model = placed(model, device=device, dtype=weight_dtype(settings.precision))
    if settings.activation_checkpointing:
        checkpoint_activations(model, settings.activation_checkpointing)
    if settings.compile:
        model.compile()
    return model


def _fresh_model(recipe: Recipe, *, seed: int, is_meta: bool) -> nn.Module:
    """Calls the recipe's `model()` under the run's seed."""
    device = torch.device("meta") if is_meta else nullcontext()
    weights_key = key(seed, Purpose.WEIGHTS)
    with generators_put_back(), device:
        seed_generators(weights_key)
        # That of the device too.
        torch.manual_seed(weights_key)
        model = recipe.model()
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the recipe's model() must return an nn.Module; it returned {type(model).__name__}."
        )
    for name, tensor in model.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise ConfigError(
                f"the model's {name} has no shape yet (a lazy module): "
                "run one batch through it in the recipe's model()."
            )
    freeze_for_good(model, recipe.frozen)
    _refuse_shared_memory(model)
    return model


def _refuse_shared_memory(model: nn.Module) -> None:
    """Raises: ConfigError for tensors of one memory that are not one tensor: they would part where
    the model goes to another device or precision, or is split.
    """
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        if _has_memory(parameter):
            _refuse_second(name, first=seen.setdefault(parameter.data_ptr(), name))
    for name, buffer in model.named_buffers():
        if _has_memory(buffer):
            _refuse_second(name, first=seen.get(buffer.data_ptr(), name))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether it is a plain tensor in memory, and no other kind that only stands for some."""
    is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    return is_plain and not tensor.is_meta and tensor.numel() > 0


def _refuse_second(name: str, *, first: str) -> None:
    if name != first:
        raise ConfigError(
            f"the model's {first} and {name} share memory without being one parameter (`.data =`): "
            "they would part where the model moves to another device or precision. Tie them by "
            f"assigning the parameter itself, or copy: {name} = {first}.detach().clone()."
        )


def _note_other_dtypes(model: nn.Module, settings: Settings) -> None:
    """Tells of weights that the model brings in another dtype than they are trained in."""
    own = weight_dtype(settings.precision)
    found: dict[torch.dtype, list[str]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        is_other = tensor.dtype not in (own, own.to_complex(), torch.float32, torch.complex64)
        if is_weight(tensor) and is_other:
            found.setdefault(tensor.dtype, []).append(name)
    for dtype, names in found.items():
        kind = str(dtype).removeprefix("torch.")
        kept = str(own).removeprefix("torch.")
        mend = ""
        if dtype == torch.bfloat16:
            mend = "; --precision bf16 computes in bfloat16, over weights in float32"
        elif dtype in (torch.float64, torch.complex128):
            mend = "; --precision fp64 keeps all of it in float64"
        logger.info("note: %s has %s: it is cast to %s%s", some(names), kind, kept, mend)


def load_first_weights(
    model: nn.Module, settings: Settings, group: Group, *, takes_all: bool = False
) -> None:
    """Copies the weights of `--init-from` into a model. Every rank calls it.

    Args: `takes_all` as `build_model` has it.

    Raises: ConfigError if they do not fit, as `load_weights` says.
    """
    load_weights(
        model,
        Path(settings.init_from),
        group=group,
        rename=settings.rename,
        partial=settings.init_partial,
        takes_all=takes_all,
    )


def _check_device(settings: Settings, group: Group) -> None:
    """Raises: ConfigError for a flag that needs another device than this rank's."""
    if settings.fsdp.cpu_offload and group.device.type == "cpu":
        raise ConfigError(
            "--fsdp.cpu-offload: this rank runs on a CPU, where weights are in host memory anyway. "
            "Leave it out."
        )
    if settings.sync_batchnorm and group.device.type != "cuda":
        raise ConfigError(
            "--sync-batchnorm: torch's SyncBatchNorm runs on CUDA only; this rank runs on a CPU. "
            "Leave it out."
        )


def checkpoint_activations(model: nn.Module, class_name: str) -> None:
    """Makes each module of a class compute its activations again in backward.

    They are not kept then; names of parameters stay as they are.

    Raises: ConfigError if the model has no such module.
    """
    modules = [module for module in model.modules() if type(module).__name__ == class_name]
    if not modules:
        kinds = sorted({type(module).__name__ for module in model.modules()})
        near = nearest(class_name, kinds)
        advice = f"Did you mean {near}?" if near else f"It has {', '.join(kinds)}."
        raise ConfigError(
            f"--activation-checkpointing {class_name}: the model has no module of that class. "
            f"{advice}"
        )
    for module in modules:
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
