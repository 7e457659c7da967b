"""Where the tests of batch jobs stand: in a folder with a recipe, and without a SLURM."""

from pathlib import Path

import pytest

# modules that look for SLURM, each by a name of its own
LOOKING = (
    "ddp_kit.launch.slurm.cluster",
    "ddp_kit.launch.runs.found",
    "ddp_kit.launch.runs.lookup",
    "ddp_kit.launch.runs.jobs",
    "ddp_kit.launch.runs.sweep",
)


@pytest.fixture
def in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user stands in a folder with a recipe, and no SLURM is there."""
    (tmp_path / "recipe.py").write_text("x = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for module in LOOKING:
        monkeypatch.setattr(f"{module}.has_slurm", lambda: False)
