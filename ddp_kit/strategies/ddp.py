"""DistributedDataParallel around the call of the loss: its options, and what travels compressed.

DDP's own buffer broadcasts stay off: they would throw away the running statistics of all ranks but
one (see `model_state.running_stats`).
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, final

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import DdpKitError, flag_changed, no_gradient
from ddp_kit.settings import Comm
from ddp_kit.strategies.optimizer_view import WholeOptimizer
from ddp_kit.strategies.whole import Whole, Wrapped


@final
class DataParallel(Whole):
    """One all-reduce per optimizer step, in buckets that overlap backward.

    Gradients are views of the buckets.
    """

    def __init__(self, group: Group, *, find_unused_parameters: bool = False, comm: Comm = "fp32"):
        self._group = group
        self._find_unused = find_unused_parameters
        self._comm = comm
        self.divisor = group.world_size  # DDP averages
        # Of each wrapper: what it sums the gradients of, in its order.
        self._summed: dict[nn.Module, list[tuple[str, nn.Parameter]]] = {}

    def wrap(self, call: nn.Module, optimizer: Optimizer) -> Wrapped:
        """Returns `call` in a DDP wrapper that the group releases before it is destroyed."""
        return Wrapped(call=self.ddp(call), optimizer_view=WholeOptimizer(optimizer))

    def renew(self, wrapped: nn.Module) -> nn.Module:
        """Returns another wrapper: one has buckets for the parameters that were trained when it
        was made."""
        return self.ddp(self.let_go(wrapped))

    def let_go(self, wrapped: nn.Module) -> nn.Module:
        """Frees the buckets of a wrapper. Returns what is in it."""
        assert isinstance(wrapped, DistributedDataParallel)
        del self._summed[wrapped]
        _release(wrapped)
        call: nn.Module = wrapped.module
        return call

    def ddp(self, call: nn.Module) -> DistributedDataParallel:
        """Returns the wrapper."""
        device = self._group.device
        wrapped = DistributedDataParallel(
            call,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._group.pg,
            find_unused_parameters=self._find_unused,
            gradient_as_bucket_view=True,
            # They are equal (`require_equal`), and gloo does not know every buffer's dtype.
            init_sync=False,
            **_no_buffer_sync(),
        )
        self._group.closing.callback(_release, wrapped)
        self._summed[wrapped] = _trained(wrapped)
        if self._comm != "fp32":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
                bf16_compress_hook,
                fp16_compress_hook,
            )

            hook = bf16_compress_hook if self._comm == "bf16" else fp16_compress_hook
            wrapped.register_comm_hook(self._group.pg, hook)
        return wrapped

    @contextmanager
    def micro_batch(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """DDP's `no_sync` for all but the last."""
        assert isinstance(wrapped, DistributedDataParallel)
        with nullcontext() if is_last else wrapped.no_sync():
            yield
        if is_last:
            _require_all(wrapped, self._summed[wrapped])


def _trained(wrapped: DistributedDataParallel) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters of a new wrapper by name, in the order of its indices."""
    found = []
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            found.append((name.removeprefix("module.model."), parameter))
    return found


def _require_all(wrapped: DistributedDataParallel, summed: list[tuple[str, nn.Parameter]]) -> None:
    """Asks DDP whether all parameters got a gradient.

    DDP itself would complain in the next forward pass only, with indices in place of names.

    Raises: DdpKitError with the names.
    """
    try:
        wrapped._check_reducer_finalized()
    except RuntimeError as error:
        indices = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
        if indices is None:
            raise
        without = [summed[int(index)] for index in indices[1].split()]
        changed = [name for name, parameter in without if not parameter.requires_grad]
        if changed:
            raise DdpKitError(flag_changed(changed, now=False)) from None
        names = [name for name, _ in without]
        raise DdpKitError(no_gradient(names, is_split=False)) from None


def _no_buffer_sync() -> dict[str, Any]:
    """Returns the option by the name that this torch knows: in 2.15 it changed, and the old one
    warns."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    if "forward_sync_buffers" in known:
        return {"forward_sync_buffers": False}
    return {"broadcast_buffers": False}


def _release(wrapped: DistributedDataParallel) -> None:
    """Drops what holds the process group: a gloo group that outlives its destruction aborts the
    process at exit."""
    # One that was let go before has none of them.
    for name in ("reducer", "logger", "process_group"):
        vars(wrapped).pop(name, None)
