"""ddp_kit: train PyTorch models on any number of ranks, with the numbers of one.

The public names are those below; each lives in the module that the table gives, imported when the name is first used: the
command line and the pytest plugin import this package too, and must not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddp_kit import schedules as schedules
    from ddp_kit.batching import plan_batches as plan_batches
    from ddp_kit.data import orders as orders
    from ddp_kit.data.data import Data as Data
    from ddp_kit.data.first_on_node import first_on_node as first_on_node
    from ddp_kit.data.loader import build_loader as build_loader
    from ddp_kit.groups import process_group as process_group
    from ddp_kit.metrics import LossSum as LossSum
    from ddp_kit.preemption import signals_noted as signals_noted
    from ddp_kit.recipe import Callback as Callback
    from ddp_kit.recipe import Objective as Objective
    from ddp_kit.recipe import Recipe as Recipe
    from ddp_kit.saving import restore as restore
    from ddp_kit.saving import save as save
    from ddp_kit.seeding import Draws as Draws
    from ddp_kit.settings import Settings as Settings
    from ddp_kit.step import should_stop as should_stop
    from ddp_kit.step import train_step as train_step
    from ddp_kit.train import run as run
    from ddp_kit.wrapping import wrap as wrap

HOMES = {
    "schedules": "ddp_kit.schedules",
    "orders": "ddp_kit.data.orders",
    "plan_batches": "ddp_kit.batching",
    "Data": "ddp_kit.data.data",
    "first_on_node": "ddp_kit.data.first_on_node",
    "build_loader": "ddp_kit.data.loader",
    "LossSum": "ddp_kit.metrics",
    "process_group": "ddp_kit.groups",
    "signals_noted": "ddp_kit.preemption",
    "Callback": "ddp_kit.recipe",
    "Objective": "ddp_kit.recipe",
    "Recipe": "ddp_kit.recipe",
    "restore": "ddp_kit.saving",
    "save": "ddp_kit.saving",
    "Draws": "ddp_kit.seeding",
    "Settings": "ddp_kit.settings",
    "should_stop": "ddp_kit.step",
    "train_step": "ddp_kit.step",
    "run": "ddp_kit.train",
    "wrap": "ddp_kit.wrapping",
}
__all__ = list(HOMES)


def __getattr__(name: str) -> object:
    """Imports a public name from its home (PEP 562)."""
    if name not in HOMES:
        raise AttributeError(f"module 'ddp_kit' has no attribute {name!r}")
    home = importlib.import_module(HOMES[name])
    value = home if HOMES[name].endswith(f".{name}") and name in ("schedules", "orders") else getattr(home, name)
    globals()[name] = value
    return value
