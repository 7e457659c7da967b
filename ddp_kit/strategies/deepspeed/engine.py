"""DeepSpeed's ZeRO: stage 1 splits the optimizer's state over the ranks, 2 gradients too, 3 weights too; 0 nothing.

Owns: the engine from `deepspeed.initialize`, and where it takes part in a step: the boundary between steps, the sum, the optimizer.
Refuses: its loss scale, clipping, schedule and checkpoints, which are ours, and single numbers as parameters.

Weights, gradients and optimizer state stay fp32. At stages 1 to 3 the optimizer steps copies of the weights, in flat partitions, and
DeepSpeed copies them back into the model: what else writes weights (a restore) must `refresh` these.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, arXiv 1910.02054.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import environment_default
from ddp_kit.errors import ConfigError, require
from ddp_kit.settings import DeepSpeed
from ddp_kit.strategies.checks import require_elementwise
from ddp_kit.strategies.deepspeed.config import Noted, config_of
from ddp_kit.strategies.deepspeed.partitions import Moments, Ungathered, gradients_of, places_of
from ddp_kit.strategies.root import Root, Through
from ddp_kit.strategies.usage_guard import Uses
from ddp_kit.strategies.whole import Function, Wrapped


@final
class Zero:
    """Every rank has the whole model but at stage 3, and of gradients and optimizer state its partition but at stage 0."""

    def __init__(self, group: Group, settings: DeepSpeed):
        """Raises: ConfigError if the package is missing, or its configuration contradicts the flags."""
        self._group, self._stage, self._config = group, settings.stage, config_of(settings)
        self._file = settings.config
        self.divisor = group.world_size  # DeepSpeed averages
        self.shards: dist.ProcessGroup | None = group.training if settings.stage else None
        self._package = _imported(group)
        self._root: Any = None
        self._engine: Any = None
        self._has_looked = self._has_evaluated = False

    def shard(self, model: nn.Module) -> None:
        """Nothing yet: DeepSpeed splits when it gets the optimizer."""
        self._root = Root(model)

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` through DeepSpeed's engine. The recipe's optimizer stays the one that steps, with its groups and their rates.

        Raises: ConfigError for an optimizer that cannot step partitions.
        """
        require_elementwise(optimizer, stage=self._stage)
        self._engine = self._initialized(optimizer)
        if (own := self._engine.data_parallel_group) is not dist.group.WORLD:
            self._group.others.append(own)
        self._group.closing.callback(self._release)
        gathered = [
            module
            for module in self._root.modules()
            if self._stage == 3 and next(module.parameters(recurse=False), None) is not None
        ]
        self._uses = Uses(self._root, gathered, is_summed_in_order=self._stage > 0)
        if not self._stage:
            return Wrapped(call=Through(self._root, call, self._uses), step=self._engine.step)
        assert self._group.training is not None
        moments = Moments(
            optimizer, places_of(self._engine.optimizer, stage=self._stage), self._group.training
        )
        return Wrapped(
            call=Through(self._engine, call, self._uses),
            step=self._engine.step,
            owns=moments.has,
            moments=moments,
            refresh=self._refresh,
        )

    def _initialized(self, optimizer: Optimizer) -> Any:
        place, device, config = (
            self._group.topology.local_rank,
            self._group.device.index,
            Noted(self._config),
        )
        with (
            self._group.connecting(),
            environment_default("LOCAL_RANK", str(place)),
        ):  # which srun does not set
            try:
                engine, *_ = self._package.initialize(
                    args=SimpleNamespace(device_rank=place if device is None else device),
                    model=self._root,
                    optimizer=optimizer,
                    config=config,
                    dist_init_required=False,
                )
            except (
                AssertionError,
                ValueError,
                self._package.runtime.config.DeepSpeedConfigError,
            ) as error:
                if not self._file:
                    raise
                raise ConfigError(
                    f"--deepspeed.config {self._file}: DeepSpeed does not take it: {error}"
                ) from error
        config.require_known(self._file)
        return engine

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls it; at stage 3 through the root, whose modules gather what they use."""
        if self._stage != 3:
            return function(*args)
        if torch.is_grad_enabled():
            return self._root(function, *args)
        is_first, self._has_evaluated = not self._has_evaluated, True
        try:  # the first one, in rehearsal, with a graph, by which a use of weights that are not there is seen
            with (
                torch.set_grad_enabled(is_first),
                Ungathered(self._root.model) if is_first else nullcontext(),
            ):
                result = self._root(function, *args)
            return tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        finally:
            self._free()

    def _free(self) -> None:
        """Drops gathered weights: DeepSpeed keeps them until the next step, a node's copy of all with `zero_hpz_partition_size`, and would
        use them though others were put in their place. With them goes the order in which it fetches: after another pass it would fail.
        """
        if self._stage == 3 and self._engine is not None:
            optimizer = self._engine.optimizer
            optimizer.parameter_offload.partition_all_parameters()
            optimizer.invalidate_secondary_tensor()
            order = optimizer.parameter_offload.get_param_coordinator()
            if not order.is_invalid_trace():
                order._invalidate_trace()

    def _refresh(self) -> None:
        """Takes what was written into the model for what is stepped and used."""
        self._free()
        self._engine.optimizer.refresh_fp32_params()

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Gradients add up on each rank (at stages 2 and 3 in its partition) until the last micro-batch, whose backward ends the sum."""
        engine = self._engine
        if (
            self._stage == 3 and engine.is_gradient_accumulation_boundary()
        ):  # a step begins: its first sum replaces the one before
            engine.optimizer.zero_grad()
        engine.set_gradient_accumulation_boundary(is_last)
        is_first, self._has_looked = (
            self._stage == 3 and not self._has_looked,
            True,
        )  # once, in rehearsal
        with (
            self._uses.micro_batch(wrapped),
            Ungathered(self._root.model) if is_first else nullcontext(),
        ):
            yield
        if is_last and not self._stage:
            engine.allreduce_gradients()

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's elements, without the padding of partitions."""
        if not self._stage:
            return [parameter.grad for parameter in parameters if parameter.grad is not None]
        wanted = {id(parameter) for parameter in parameters}
        return [
            part
            for parameter, part in gradients_of(self._engine.optimizer, stage=self._stage)
            if id(parameter) in wanted
        ]

    def _release(self) -> None:
        """Lets go of the process groups, which must be gone before they are destroyed, and of what DeepSpeed keeps in its modules."""
        self._engine.destroy()
        self._engine = self._root = self.shards = None
        comm, groups = self._package.comm.comm, self._package.utils.groups
        comm.cdb = None
        groups._release_process_group_references()


def _imported(group: Group) -> Any:
    """Returns the package, set to this rank's device.

    Without its operation over shared memory, which training does not use: DeepSpeed would compile it here, and need gcc.
    """
    nvml = environment_default(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # which DeepSpeed sets, and leaves set
    with nvml, environment_default("DS_ACCELERATOR", group.device.type):
        package = require("deepspeed", extra="deepspeed")
        package.accelerator.get_accelerator()
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]  # its own name for it
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    return package


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed knows a few optimizers by name and warns of all others."""
    return "untested optimizer" not in record.getMessage()
