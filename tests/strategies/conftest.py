"""The server of ranks imports DeepSpeed once: each rank that did so itself would take 3 s for it."""

import importlib.util

import pytest

from ddp_kit.testing.pool import Pool

# DeepSpeed compiles a function when an engine is made, for which torch imports its compiler.
HEAVY = ("deepspeed", "torch._inductor.compile_fx")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Adds to what the server imports, which starts after collection."""
    if importlib.util.find_spec("deepspeed") is not None:
        Pool.current.get().imports += HEAVY
