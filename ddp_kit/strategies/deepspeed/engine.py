"""DeepSpeed's ZeRO: stage 1 splits the optimizer's state over the ranks, 2 gradients too, 3 weights
too; 0 nothing.

The engine from `deepspeed.initialize` takes part in a step at three places: the boundary between
steps, the sum, the optimizer. Its loss scale, clipping, schedule and checkpoints stay off: those
are ours.

Weights, gradients and optimizer state stay fp32. At stages 1 to 3 the optimizer steps copies of the
weights, in flat partitions, and DeepSpeed copies them back into the model: what else writes weights
(`PartitionedOptimizer.restore`) refreshes these.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models,
arXiv 1910.02054.
"""

import importlib
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from ddp_kit.strategies.deepspeed.config import WatchedConfig, config_of
from ddp_kit.strategies.deepspeed.partitions import PartitionedOptimizer, gradients_of, slices_of
from ddp_kit.strategies.optimizer_view import WholeOptimizer
from ddp_kit.strategies.outside_use import EmptyWeightGuard
from ddp_kit.strategies.root import CallThroughRoot, Root
from ddp_kit.strategies.usage_guard import UsageGuard
from ddp_kit.strategies.whole import Function, Wrapped


@final
class DeepSpeedZero:
    """Every rank has the whole model but at stage 3, and of gradients and optimizer state its
    partition but at stage 0."""

    def __init__(self, group: Group, settings: DeepSpeed):
        """Raises: ConfigError if the package is missing, or its configuration contradicts the
        flags."""
        self._group = group
        self._stage = settings.stage
        self._config = config_of(settings)
        self._file = settings.config
        self.divisor = group.world_size  # DeepSpeed averages
        self.shards: dist.ProcessGroup | None = group.pg if settings.stage else None
        self._package = _imported(group)
        self._root: Any = None
        self._engine: Any = None
        self._has_trained = False
        self._has_evaluated = False

    def shard(self, model: nn.Module) -> None:
        """Nothing yet: DeepSpeed splits when it gets the optimizer."""
        self._root = Root(model)

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` through DeepSpeed's engine.

        The recipe's optimizer stays the one that steps, with its groups and their rates.

        Raises: ConfigError for an optimizer that cannot step partitions.
        """
        require_elementwise(optimizer, stage=self._stage)
        self._engine = self._initialized(optimizer)
        own_group = self._engine.data_parallel_group
        if own_group is not dist.group.WORLD:
            self._group.others.append(own_group)
        self._group.closing.callback(self._release)
        gathered = self._gathered_modules()
        self._guard = UsageGuard(self._root, gathered, is_summed_in_order=self._stage > 0)
        if not self._stage:
            through = CallThroughRoot(self._root, call, self._guard)
            whole = WholeOptimizer(optimizer, step=self._engine.step)
            return Wrapped(call=through, optimizer_view=whole)
        assert self._group.pg is not None
        slices = slices_of(self._engine.optimizer, stage=self._stage)
        partitioned = PartitionedOptimizer(
            optimizer,
            slices,
            self._group.pg,
            step=self._engine.step,
            refresh=self._refresh,
        )
        through = CallThroughRoot(self._engine, call, self._guard)
        return Wrapped(call=through, optimizer_view=partitioned)

    def _gathered_modules(self) -> list[nn.Module]:
        """Returns the modules at whose calls DeepSpeed gathers weights: at stage 3 those that have
        parameters of their own."""
        if self._stage != 3:
            return []
        modules = self._root.modules()
        return [m for m in modules if next(m.parameters(recurse=False), None) is not None]

    def _initialized(self, optimizer: Optimizer) -> Any:
        """Returns DeepSpeed's engine.

        Raises: ConfigError if DeepSpeed does not take the file, or knows no such key.
        """
        local_rank = self._group.topology.local_rank
        device = self._group.device.index
        config = WatchedConfig(self._config)
        # srun does not set LOCAL_RANK.
        with self._group.connecting(), environment_default("LOCAL_RANK", str(local_rank)):
            try:
                engine, *_ = self._package.initialize(
                    args=SimpleNamespace(device_rank=local_rank if device is None else device),
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

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Is never asked for: `require_splittable` refuses it."""
        raise NotImplementedError

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls it; at stage 3 through the root, whose modules gather what they use."""
        if self._stage != 3:
            return function(*args)
        if torch.is_grad_enabled():
            return self._root(function, *args)
        # The first one, in the dry run, has a graph, by which a use of weights that are not there
        # is seen.
        is_first = not self._has_evaluated
        self._has_evaluated = True
        try:
            with torch.set_grad_enabled(is_first), self._watch(is_on=is_first):
                result = self._root(function, *args)
            return tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        finally:
            self._free()

    def _watch(self, *, is_on: bool) -> AbstractContextManager[object]:
        return EmptyWeightGuard(self._root.model) if is_on else nullcontext()

    def _free(self) -> None:
        """Drops gathered weights.

        DeepSpeed keeps them until the next step, a node's copy of all with
        `zero_hpz_partition_size`, and would use them though others were put in their place. With
        them goes the order in which it fetches: after another pass it would fail.
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
        """Gradients add up on each rank (at stages 2 and 3 in its partition) until the last
        micro-batch, whose backward ends the sum."""
        engine = self._engine
        if self._stage == 3 and engine.is_gradient_accumulation_boundary():
            # A step begins: its first sum replaces the one before.
            engine.optimizer.zero_grad()
        engine.set_gradient_accumulation_boundary(is_last)
        # Watched once, in the dry run.
        is_watched = self._stage == 3 and not self._has_trained
        self._has_trained = True
        with self._guard.micro_batch(wrapped), self._watch(is_on=is_watched):
            yield
        if is_last and not self._stage:
            engine.allreduce_gradients()

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's elements, without the padding of partitions."""
        if not self._stage:
            return [parameter.grad for parameter in parameters if parameter.grad is not None]
        wanted = {id(parameter) for parameter in parameters}
        found = []
        for parameter, gradient in gradients_of(self._engine.optimizer, stage=self._stage):
            if id(parameter) in wanted:
                found.append(gradient)
        return found

    def _release(self) -> None:
        """Lets go of the process groups, which must be gone before they are destroyed, and of what
        DeepSpeed keeps in its modules."""
        self._engine.destroy()
        self._engine = None
        self._root = None
        self.shards = None
        self._package.comm.comm.cdb = None
        self._package.utils.groups._release_process_group_references()


def _imported(group: Group) -> Any:
    """Returns the package, set to this rank's device.

    Without its operation over shared memory, which training does not use: DeepSpeed would compile
    it here, and need gcc.
    """
    # DeepSpeed sets this variable, and leaves it set.
    nvml = environment_default("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    with nvml, environment_default("DS_ACCELERATOR", group.device.type):
        package = require("deepspeed", extra="deepspeed")
        package.accelerator.get_accelerator()
        comm: Any = importlib.import_module("deepspeed.comm.torch")
        comm.build_shm_op = lambda: None  # its own name for the builder
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    return package


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed knows a few optimizers by name and warns of all others."""
    return "untested optimizer" not in record.getMessage()
