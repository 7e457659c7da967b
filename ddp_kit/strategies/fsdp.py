"""FSDP2: parameters, gradients and optimizer state split over the ranks by rows, gathered module by module where they are used.

Owns: what is split as one, the precision in which weights travel, and one root through which every use of the model goes.
Refuses: saying what FSDP2 cannot split (see `splittable`).

The root is a module of ours around the model, whose forward calls any function: so parts of the model may be used freely, as with ddp.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ddp_kit.distributed.local_shard import local
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError
from ddp_kit.settings import Fsdp, Precision
from ddp_kit.strategies.checks import Unread
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.strategies.optimizers import step_quietly
from ddp_kit.strategies.precision import AUTOCAST
from ddp_kit.strategies.root import Root, Through
from ddp_kit.strategies.usage_guard import Uses
from ddp_kit.strategies.whole import Function, Wrapped

OUTSIDE = (
    "--fsdp.wrap, --fsdp.wrap-size: the loss or `evaluate` uses weights of a wrapped module outside its forward pass, where each rank has "
    "its rows only. Let the optimizer decay weights, wrap fewer modules, or type --strategy zero1."
)


@final
class FullyShardedDataParallel:
    """Each rank holds 1/W of every parameter (1/ranks of a node with `hybrid`)."""

    def __init__(self, group: Group, settings: Fsdp, *, precision: Precision):
        self._group, self._settings, self._precision = group, settings, precision
        self.divisor = group.world_size  # FSDP averages
        self._mesh = _mesh(group, is_hybrid=settings.hybrid)
        has_offload = settings.cpu_offload  # gradients are then where NCCL does not reach
        self.shards: dist.ProcessGroup | None = (
            group.control if has_offload else self._mesh.get_group(self._mesh.ndim - 1)
        )
        self._root: Any = None
        self._has_evaluated = False

    def shard(self, model: nn.Module) -> None:
        """Splits the modules of the given classes, or from a number of parameters on, each as one, and the rest with the root."""
        dtype = gathered_dtype(model, self._precision)
        root, inner = Root(model), modules_to_wrap(model, self._settings)
        for module in [*inner, root]:
            policy = MixedPrecisionPolicy(
                param_dtype=dtype,
                reduce_dtype=torch.float32 if dtype else None,
                cast_forward_inputs=module is not root,
            )
            offload = CPUOffloadPolicy() if self._settings.cpu_offload else OffloadPolicy()
            fully_shard(module, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
        self._root, self._uses = root, Uses(root, inner)
        if hasattr(
            root, "set_reduce_scatter_unused_params"
        ):  # from torch 2.15 on: a rank that leaves one out ends its backward pass
            self._root.set_reduce_scatter_unused_params(True)
        self._group.closing.callback(self._release)

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` through the root. The optimizer was built from the split parameters."""
        return Wrapped(call=Through(self._root, call, self._uses), step=_stepping(optimizer))

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls it through the root, and frees what was gathered: without a backward pass nothing else would.

        Raises: ConfigError if it uses weights of a wrapped module outside its forward pass.
        """
        is_rehearsed = torch.is_grad_enabled() or not self._has_evaluated
        self._has_evaluated |= not torch.is_grad_enabled()
        is_compiled = (
            self._root.model._compiled_call_impl is not None
        )  # anew for a pass that is watched
        try:
            with Unread(OUTSIDE) if is_rehearsed and not is_compiled else nullcontext():
                result = self._root(function, *args)
            if any(hasattr(part, "to_local") for part in tree_leaves(result)):
                raise ConfigError(OUTSIDE)
            return result
        except RuntimeError as error:
            if "DTensor" in str(error):
                raise ConfigError(OUTSIDE) from error
            raise
        finally:
            if not torch.is_grad_enabled():
                self._root.reshard()

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients stay whole on each rank until the last micro-batch, whose backward sums and splits them."""
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_is_last_backward(is_last)
        return self._uses.micro_batch(wrapped)

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's rows."""
        return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]

    def _release(self) -> None:
        """Lets go of the process groups, which must be gone before they are destroyed."""
        self.shards = None
        self._root = self._mesh = None  # type: ignore[assignment]  # the run is over


def _mesh(group: Group, *, is_hybrid: bool) -> DeviceMesh:
    """Returns the ranks in one line, or as nodes x ranks of a node. Raises: ConfigError if nodes differ."""
    assert group.training is not None
    kind, topology = group.device.type, group.topology
    if not is_hybrid:
        return DeviceMesh.from_group(group.training, kind, mesh_dim_names=("shard",))
    if topology.nodes * topology.local_world_size != group.world_size:
        raise ConfigError(
            f"--fsdp.hybrid: {group.world_size} ranks on {topology.nodes} nodes, {topology.local_world_size} of them here: expected as "
            "many on each node."
        )
    with group.connecting():
        mesh = init_device_mesh(
            kind, (topology.nodes, topology.local_world_size), mesh_dim_names=("replicate", "shard")
        )
        for own in mesh.get_all_groups():
            dist.all_reduce(
                torch.zeros(1, device=group.device), group=own
            )  # connects, so that an error cuts these connections too
            group.others.append(own)
    return mesh


def _stepping(optimizer: Optimizer) -> Callable[[], None]:
    """Returns what steps an optimizer, watched for the first time."""
    kind = type(optimizer).__name__
    watches = [
        Unread(
            f"--strategy fsdp: {kind} reads numbers off weights or gradients that are split. Type --strategy zero1."
        )
    ]

    def step() -> None:
        with watches.pop() if watches else nullcontext():
            _step(optimizer)

    return step


def _step(optimizer: Optimizer) -> None:
    """Raises: ConfigError for an optimizer that does what FSDP2's tensors cannot."""
    try:
        step_quietly(optimizer)
    except (NotImplementedError, RuntimeError) as error:
        if not {"DTensor", "DeviceMesh", "placement"} & set(re.findall(r"\w+", str(error))):
            raise
        kind = type(optimizer).__name__
        raise ConfigError(
            f"--strategy fsdp: {kind} cannot step weights that are split ({error}). Type --strategy zero1."
        ) from error


def gathered_dtype(model: nn.Module, precision: Precision) -> torch.dtype | None:
    """Returns the type in which weights are gathered, None: their own. Running statistics stay fp32, and all layers' weights with them."""
    has_statistics = any(
        isinstance(module, _NormBase) and module.track_running_stats for module in model.modules()
    )
    return None if has_statistics else AUTOCAST.get(precision)
