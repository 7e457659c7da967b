"""ddp_kit: train PyTorch models on any number of ranks, with the numbers of one.

The public names are those below; each lives in the module that the table gives and is imported when
it is first used: the command line and the pytest plugin import this package too, and must not wait
for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddp_kit import schedules as schedules
    from ddp_kit.checkpoint.own_loop import restore as restore
    from ddp_kit.checkpoint.own_loop import save as save
    from ddp_kit.data import orders as orders
    from ddp_kit.data.batch_plan import plan_batches as plan_batches
    from ddp_kit.data.dataset import Data as Data
    from ddp_kit.data.first_on_node import first_on_node as first_on_node
    from ddp_kit.data.loader import build_loader as build_loader
    from ddp_kit.data.seeding import Draws as Draws
    from ddp_kit.distributed.process_group import process_group as process_group
    from ddp_kit.metrics import LossMean as LossMean
    from ddp_kit.metrics import LossSum as LossSum
    from ddp_kit.recipe import Callback as Callback
    from ddp_kit.recipe import Objective as Objective
    from ddp_kit.recipe import Recipe as Recipe
    from ddp_kit.settings import Settings as Settings
    from ddp_kit.setup.wrap import wrap as wrap
    from ddp_kit.stopping.signals import signals_noted as signals_noted
    from ddp_kit.train import run as run
    from ddp_kit.training.step import should_stop as should_stop
    from ddp_kit.training.step import train_step as train_step

HOMES = {
    "schedules": "ddp_kit.schedules",
    "orders": "ddp_kit.data.orders",
    "plan_batches": "ddp_kit.data.batch_plan",
    "Data": "ddp_kit.data.dataset",
    "first_on_node": "ddp_kit.data.first_on_node",
    "build_loader": "ddp_kit.data.loader",
    "LossSum": "ddp_kit.metrics",
    "LossMean": "ddp_kit.metrics",
    "process_group": "ddp_kit.distributed.process_group",
    "signals_noted": "ddp_kit.stopping.signals",
    "Callback": "ddp_kit.recipe",
    "Objective": "ddp_kit.recipe",
    "Recipe": "ddp_kit.recipe",
    "restore": "ddp_kit.checkpoint.own_loop",
    "save": "ddp_kit.checkpoint.own_loop",
    "Draws": "ddp_kit.data.seeding",
    "Settings": "ddp_kit.settings",
    "should_stop": "ddp_kit.training.step",
    "train_step": "ddp_kit.training.step",
    "run": "ddp_kit.train",
    "wrap": "ddp_kit.setup.wrap",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    """Imports a public name from its home (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module 'ddp_kit' has no attribute {name!r}")
    home = importlib.import_module(HOMES[name])
    value = (
        home
        if HOMES[name].endswith(f".{name}") and name in ("schedules", "orders")
        else getattr(home, name)
    )
    globals()[name] = value
    return value
