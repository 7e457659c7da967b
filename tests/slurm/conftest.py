"""Runs that are submitted to the tests' cluster."""

from pathlib import Path

import pytest
from clusters import Cluster
from slurm_jobs import Trained, train


@pytest.fixture
def trained(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Submits runs to the cluster from the test's own process."""
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *flags, name="run", **more: train(
        cluster, tmp_path / "runs" / name, *flags, **more
    )
