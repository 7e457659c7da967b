"""What every test of ddp_kit has: the kit itself (its own plugin), pytest's pytester, a SLURM, and a check that nothing is left behind."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: its threads wait for each other by spinning, on cores that other tests could use.
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["pytester", "ddp_kit.testing.plugin", "clusters", "small_cifar"]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(no_leaks: None) -> None:
    """Applies `no_leaks` to every test."""


@pytest.fixture(autouse=True)
def _forgets_recipes() -> Iterator[None]:
    """A recipe that is loaded in pytest's process becomes one of its modules; the next test must not find it."""
    yield
    recipes = str(Path(__file__).parents[1] / "recipes")
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(recipes):
            del sys.modules[name]
