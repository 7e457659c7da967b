"""What every test of ddp_kit has: the kit itself (its own plugin), pytest's pytester, and a check that nothing is left behind."""

import pytest

pytest_plugins = ["pytester", "ddp_kit.testing.plugin"]


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(no_leaks: None) -> None:
    """Applies `no_leaks` to every test."""
