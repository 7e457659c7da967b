"""How training is spread over ranks: the choice of a strategy by a flag."""

from ddp_kit.distributed.process_group import Group
from ddp_kit.settings import Settings
from ddp_kit.strategies.base import Strategy
from ddp_kit.strategies.ddp import DataParallel
from ddp_kit.strategies.exact import ExactDataParallel, ExactSingle
from ddp_kit.strategies.single import Single
from ddp_kit.strategies.whole import Function, Wrapped


def choose_strategy(group: Group, settings: Settings) -> Strategy:
    """Returns the strategy for these ranks: one process is not wrapped at all.

    Raises: ConfigError if its package is missing.
    """
    if group.world_size == 1:
        return ExactSingle() if settings.exact else Single()
    if settings.exact:
        return ExactDataParallel(group, find_unused_parameters=settings.find_unused_parameters)
    if settings.strategy == "fsdp":
        from ddp_kit.strategies.fsdp import FullyShardedDataParallel

        return FullyShardedDataParallel(group, settings.fsdp, precision=settings.precision)
    if settings.strategy == "deepspeed":
        from ddp_kit.strategies.deepspeed.engine import DeepSpeedZero

        return DeepSpeedZero(group, settings.deepspeed)
    ddp = DataParallel(
        group, find_unused_parameters=settings.find_unused_parameters, comm=settings.comm
    )
    if settings.strategy == "zero1":
        from ddp_kit.strategies.zero1 import ZeroOne

        return ZeroOne(group, ddp)
    return ddp


__all__ = [
    "DataParallel",
    "ExactDataParallel",
    "ExactSingle",
    "Function",
    "Single",
    "Strategy",
    "Wrapped",
    "choose_strategy",
]
