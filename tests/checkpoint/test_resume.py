"""A run that was killed goes on bit for bit."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from launching import train
from paths import KIT

MORTAL = str(KIT / "mortal.py")
SHORT = ("--epochs", "2", "--width", "64")
# An evaluation starts workers of its own.
WITH_WORKERS = ("--num-workers", "1", "--eval-every", "100")
SLOW = [pytest.mark.slow, pytest.mark.steady]


def run(folder: Path, *args: str, deaths: str = "", world_size: int = 3) -> Any:
    folder.mkdir(exist_ok=True)
    return train(
        *args,
        folder=folder,
        recipe=MORTAL,
        world_size=world_size,
        env={"DEATHS": deaths},
        limit_s=60,
    )


def records(folder: Path) -> list[dict[str, Any]]:
    kept = ("kind", "step", "epoch", "loss", "accuracy", "lr", "grad_norm", "loss_scale")
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: record.get(name) for name in kept} for record in map(json.loads, lines)]


@pytest.mark.parametrize(
    ("world_size", "args", "deaths"),
    [
        (3, ["--save-every", "3", "--epochs", "2"], ["5:1", "13:0"]),
        (2, [*SHORT, "--save-every", "5", "--optimizer", "sgd", *WITH_WORKERS], ["13:1"]),
        (2, [*SHORT, "--save-every", "7", "--precision", "bf16"], ["9:0"]),
        pytest.param(3, ["--save-every", "3"], ["8:1", "17:0", "21:2"], marks=SLOW),
        pytest.param(3, ["--save-every", "1", "--precision", "fp16"], ["6:1", "11:2"], marks=SLOW),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    tmp_path: Path, world_size: int, args: list[str], deaths: list[str]
) -> None:
    """On 3 ranks too: with two, DDP's rebuilt buckets could not show, nor in a model of one bucket."""
    whole = run(tmp_path / "whole", *args, world_size=world_size)
    assert whole.codes == [0] * world_size, whole.errors
    for death in deaths:
        cut = run(tmp_path / "cut", *args, deaths=death, world_size=world_size)
        assert -signal.SIGKILL in cut.codes, cut.errors
        assert cut.status["status"] == "failed"
    last = run(tmp_path / "cut", *args, world_size=world_size)
    assert last.codes == [0] * world_size, last.errors
    assert last.status["weights_sha256"] == whole.status["weights_sha256"]
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    assert last.status["metrics"] == whole.status["metrics"]


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=SLOW)])
def test_exact_runs_have_the_same_bits_across_kills_and_numbers_of_ranks(
    tmp_path: Path, optimizer: str
) -> None:
    args = ["--exact", "--micro-batch", "6", "--save-every", "3", "--optimizer", optimizer, *SHORT]
    whole = run(tmp_path / "whole", *args, world_size=1)
    assert whole.codes == [0], whole.errors
    for world_size, death in ((4, "4:2"), (1, "11:0")):
        cut = run(tmp_path / "cut", *args, deaths=death, world_size=world_size)
        assert -signal.SIGKILL in cut.codes, cut.errors
    last = run(tmp_path / "cut", *args, world_size=2)
    assert last.status["weights_sha256"] == whole.status["weights_sha256"]
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_data_with_a_state_of_their_own_go_on_from_it_on_as_many_ranks(tmp_path: Path) -> None:
    args = ["--counted", "--save-every", "4", *SHORT]
    whole = run(tmp_path / "whole", *args, world_size=2)
    assert whole.codes == [0, 0], whole.errors
    assert -signal.SIGKILL in run(tmp_path / "cut", *args, deaths="14:1", world_size=2).codes
    refused = run(tmp_path / "cut", *args, world_size=1)
    assert refused.codes == [2]
    assert "type --resume-data restart" in refused.errors
    last = run(tmp_path / "cut", *args, world_size=2)
    assert last.status["weights_sha256"] == whole.status["weights_sha256"], last.errors
    assert records(tmp_path / "cut") == records(tmp_path / "whole")


def test_frozen_weights_stay_out_of_checkpoints_on_request_and_the_run_goes_on_over_the_same_ones(
    tmp_path: Path,
) -> None:
    args = ["--frozen", "--save-trainable-only", "--save-every", "4", *SHORT]
    whole = run(tmp_path / "whole", *args, world_size=1)
    assert whole.codes == [0], whole.errors
    state = json.loads((tmp_path / "whole/run/checkpoints/step-00000020/state.json").read_text())
    assert "model/last.weight" in state["tensors"]
    assert not any("middle" in name for name in state["tensors"])
    assert len(state["base_sha256"]) == 64
    assert run(tmp_path / "cut", *args, deaths="14:0", world_size=1).codes == [-signal.SIGKILL]
    last = run(tmp_path / "cut", *args, world_size=1)
    assert last.status["weights_sha256"] == whole.status["weights_sha256"], last.errors
    other = run(tmp_path / "cut", *args, "--seed", "1", "--change", "seed", world_size=1)
    assert "was saved over frozen weights of SHA-256" in other.errors
