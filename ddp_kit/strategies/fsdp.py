"""FSDP2: parameters, gradients and optimizer state split over the ranks by rows.

Weights are gathered module by module where they are used. The root is a module of ours around the
model, whose forward calls any function: so parts of the model may be used freely, as with ddp. What
FSDP2 cannot split is refused before (`checks`).
"""

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
from ddp_kit.strategies.fsdp_modules import modules_to_wrap
from ddp_kit.strategies.fsdp_optimizer import SplitOptimizer
from ddp_kit.strategies.outside_use import FSDP_MESSAGE, PartialReadGuard
from ddp_kit.strategies.precision import AUTOCAST
from ddp_kit.strategies.root import CallThroughRoot, Root
from ddp_kit.strategies.usage_guard import UsageGuard
from ddp_kit.strategies.whole import Function, Wrapped


@final
class FullyShardedDataParallel:
    """Each rank holds 1/W of every parameter (1/ranks of a node with `hybrid`)."""

    def __init__(self, group: Group, settings: Fsdp, *, precision: Precision):
        """Every rank calls it.

        Raises: ConfigError if `hybrid` is asked for and nodes have different numbers of ranks.
        """
        self._group = group
        self._settings = settings
        self._precision = precision
        self.divisor = group.world_size  # FSDP averages
        self._mesh = _mesh(group, is_hybrid=settings.hybrid)
        self.shards: dist.ProcessGroup | None
        if settings.cpu_offload:
            # Gradients are then in host memory, where NCCL does not reach.
            self.shards = group.control_pg
        else:
            self.shards = self._mesh.get_group(self._mesh.ndim - 1)
        self._root: Any = None
        self._has_evaluated = False

    def shard(self, model: nn.Module) -> None:
        """Splits the modules of the given classes, or from a size on, each as one, and the rest
        with the root."""
        dtype = gathered_dtype(model, self._precision)
        root = Root(model)
        inner = modules_to_wrap(model, self._settings)
        for module in [*inner, root]:
            policy = MixedPrecisionPolicy(
                param_dtype=dtype,
                reduce_dtype=torch.float32 if dtype else None,
                cast_forward_inputs=module is not root,
            )
            offload = CPUOffloadPolicy() if self._settings.cpu_offload else OffloadPolicy()
            fully_shard(module, mesh=self._mesh, mp_policy=policy, offload_policy=offload)
        self._root = root
        self._guard = UsageGuard(root, inner)
        # From torch 2.15 on: so a rank that leaves a parameter out ends its backward pass too.
        if hasattr(root, "set_reduce_scatter_unused_params"):
            self._root.set_reduce_scatter_unused_params(True)
        self._group.closing.callback(self._release)

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` through the root. The optimizer was built from the split parameters."""
        through = CallThroughRoot(self._root, call, self._guard)
        return Wrapped(call=through, optimizer_view=SplitOptimizer(optimizer))

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Is never asked for: `require_splittable` refuses it."""
        raise NotImplementedError

    def enter(self, function: Function, *args: Any) -> Any:
        """Calls it through the root, and frees what was gathered.

        Without a backward pass nothing else would free it.

        Raises: ConfigError if it uses weights of a wrapped module outside its forward pass.
        """
        try:
            with self._watch():
                result = self._root(function, *args)
            if any(hasattr(leaf, "to_local") for leaf in tree_leaves(result)):
                raise ConfigError(FSDP_MESSAGE)
            return result
        except RuntimeError as error:
            if "DTensor" in str(error):
                raise ConfigError(FSDP_MESSAGE) from error
            raise
        finally:
            if not torch.is_grad_enabled():
                self._root.reshard()

    def _watch(self) -> AbstractContextManager[object]:
        """Returns the watch over the dry runs: passes with gradients, and the first evaluation."""
        is_dry_run = torch.is_grad_enabled() or not self._has_evaluated
        if not torch.is_grad_enabled():
            self._has_evaluated = True
        # A compiled model would be compiled a second time for a pass that is watched.
        is_compiled = self._root.model._compiled_call_impl is not None
        if is_dry_run and not is_compiled:
            return PartialReadGuard(FSDP_MESSAGE)
        return nullcontext()

    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
        """Gradients stay whole on each rank until the last micro-batch, whose backward sums and
        splits them."""
        self._root.set_requires_gradient_sync(is_last)
        self._root.set_is_last_backward(is_last)
        return self._guard.micro_batch(wrapped)

    def gradients(self, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """Returns this rank's rows."""
        return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]

    def _release(self) -> None:
        """Lets go of the process groups, which must be gone before they are destroyed."""
        self.shards = None
        # The run is over: nothing asks for them any more.
        self._root = self._mesh = None  # type: ignore[assignment]


def _mesh(group: Group, *, is_hybrid: bool) -> DeviceMesh:
    """Returns the ranks in one line, or as nodes x ranks of a node. Every rank calls it.

    Raises: ConfigError if nodes differ.
    """
    assert group.pg is not None
    kind = group.device.type
    if not is_hybrid:
        return DeviceMesh.from_group(group.pg, kind, mesh_dim_names=("shard",))
    topology = group.topology
    if topology.nodes * topology.local_world_size != group.world_size:
        raise ConfigError(
            f"--fsdp.hybrid: {group.world_size} ranks on {topology.nodes} nodes, "
            f"{topology.local_world_size} of them here: expected as many on each node."
        )
    with group.connecting():
        mesh = init_device_mesh(
            kind, (topology.nodes, topology.local_world_size), mesh_dim_names=("replicate", "shard")
        )
        for own in mesh.get_all_groups():
            # Connects now, so that an error cuts these connections too.
            dist.all_reduce(torch.zeros(1, device=group.device), group=own)
            group.others.append(own)
    return mesh


def gathered_dtype(model: nn.Module, precision: Precision) -> torch.dtype | None:
    """Returns the type in which weights are gathered, None: their own.

    Running statistics stay fp32, and all layers' weights with them.
    """
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            return None
    return AUTOCAST.get(precision)
