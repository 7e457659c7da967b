"""What every shipped recipe is held to: the same numbers on any number of ranks, and going on bit for bit after a kill."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launching import Ended, train
from paths import KIT, RECIPES

from ddp_kit.recipe import load_recipe

DOOMED = str(KIT / "doomed.py")


def ran(
    name: str, *args: str, folder: Path, world_size: int = 1, deaths: str = "", limit_s: float = 60
) -> Ended:
    """Runs recipes/NAME.py in a folder of its own."""
    folder.mkdir(exist_ok=True)
    env = {"RECIPE": str(RECIPES / f"{name}.py"), "DEATHS": deaths}
    return train(
        *args, folder=folder, recipe=DOOMED, world_size=world_size, env=env, limit_s=limit_s
    )


def made(name: str, **changes: Any) -> Any:
    """Returns the `Recipe` of recipes/NAME.py with settings."""
    source = load_recipe(str(RECIPES / f"{name}.py"))
    return source.build(source.settings(**changes))


def finished(
    name: str, *args: str, folder: Path, world_size: int = 1, limit_s: float = 60
) -> Ended:
    """Runs a recipe to its end."""
    ended = ran(name, *args, folder=folder, world_size=world_size, limit_s=limit_s)
    assert ended.codes == [0] * world_size, ended.errors
    return ended


def values(ended: Ended, name: str = "loss", *, kind: str = "train") -> list[float]:
    """Returns a metric of all records of a kind."""
    records = [
        json.loads(line) for line in (ended.run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [record[name] for record in records if record["kind"] == kind and name in record]


def assert_same_numbers(
    name: str,
    *args: str,
    tmp_path: Path,
    worlds: Sequence[int] = (1, 2),
    within: float = 1e-9,
    metric: str = "loss",
) -> list[float]:
    """Asserts that a training metric agrees, step by step, between numbers of ranks (in fp64, as `args` should say). Returns it."""
    runs = [
        values(
            finished(
                name, "--log-every", "1", *args, folder=tmp_path / f"ranks-{size}", world_size=size
            ),
            metric,
        )
        for size in worlds
    ]
    for other in runs[1:]:
        assert (
            max(abs(a - b) / max(1.0, abs(a)) for a, b in zip(runs[0], other, strict=True))
            <= within
        )
    return runs[0]


def assert_goes_on_bit_for_bit(
    name: str, *args: str, tmp_path: Path, deaths: str, world_size: int = 2, metric: str = "loss"
) -> None:
    """Asserts that a run killed at `deaths` ends with the weights and losses of the one that was not. `args` with --save-every."""
    whole = finished(
        name, "--log-every", "1", *args, folder=tmp_path / "whole", world_size=world_size
    )
    cut = ran(
        name,
        "--log-every",
        "1",
        *args,
        folder=tmp_path / "cut",
        world_size=world_size,
        deaths=deaths,
    )
    assert -signal.SIGKILL in cut.codes, cut.errors
    last = finished(name, "--log-every", "1", *args, folder=tmp_path / "cut", world_size=world_size)
    assert last.status["weights_sha256"] == whole.status["weights_sha256"]
    assert values(last, metric) == values(whole, metric) != []


def assert_exact(
    name: str, *args: str, tmp_path: Path, worlds: Sequence[int] = (1, 2, 4), metric: str = "loss"
) -> None:
    """Asserts that `--exact` gives the same weights and losses bit for bit on each number of ranks. `args` with --micro-batch."""
    found: list[tuple[Any, ...]] = []
    for size in worlds:
        ended = finished(
            name,
            "--exact",
            "--log-every",
            "1",
            *args,
            folder=tmp_path / f"exact-{size}",
            world_size=size,
        )
        found.append((ended.status["weights_sha256"], values(ended, metric)))
    assert found[0][1]
    assert all(other == found[0] for other in found[1:])
