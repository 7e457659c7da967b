"""The next life of a run: at other numbers of ranks, after a signal, with other settings, in other places."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Settings, plain, recipe
from launching import train
from lives import alone
from paths import KIT
from torch import nn

from ddp_kit import process_group
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps
from ddp_kit.checkpoint.state_dict import restore_state, state_of
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.errors import ConfigError
from ddp_kit.setup.build import build
from ddp_kit.train import main

MORTAL = str(KIT / "mortal.py")
SMALL = ["--width", "16", "--save-every", "3"]


def run(folder: Path, *args: str, deaths: str = "", world_size: int = 2) -> Any:
    folder.mkdir(exist_ok=True)
    env = {"DEATHS": deaths, "EVERY_STEP": "yes"}
    return train(
        *SMALL, *args, folder=folder, recipe=MORTAL, world_size=world_size, env=env, limit_s=60
    )


def records(folder: Path) -> list[dict[str, Any]]:
    kept = ("kind", "step", "epoch", "loss", "accuracy", "lr", "grad_norm")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: record.get(name) for name in kept} for record in map(json.loads, lines)]


def storage_of(run_dir: Path) -> LocalDisk:
    return LocalDisk(run_dir / "checkpoints")


# Other numbers of ranks


def test_a_run_goes_on_at_any_number_of_ranks_with_the_same_batches(tmp_path: Path) -> None:
    """Equal losses at every step, with dropout, BatchNorm and augmentation: the same samples in the same order, each step once."""
    args = ["--precision", "fp64", "--epochs", "2"]
    whole = run(tmp_path / "whole", *args)
    assert whole.codes == [0, 0], whole.errors
    for world_size, death in ((4, "7:3"), (3, "11:1"), (1, "15:0")):
        cut = run(tmp_path / "cut", *args, deaths=death, world_size=world_size)
        assert -signal.SIGKILL in cut.codes, cut.errors
    last = run(tmp_path / "cut", *args, world_size=2)
    assert last.codes == [0, 0], last.errors
    one, other = records(whole.run_dir), records(last.run_dir)
    assert [(record["kind"], record["step"], record["epoch"]) for record in other] == [
        (record["kind"], record["step"], record["epoch"]) for record in one
    ]
    resumed = [
        event["step"]
        for event in map(json.loads, (last.run_dir / "events.jsonl").read_text().splitlines())
        if event["event"] == "resume"
    ]
    assert len(resumed) == 3
    assert all(0 < step < death for step, death in zip(resumed, (7, 11, 15), strict=True))
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, other, strict=True)) <= 1e-9
    manifest = open_checkpoint(storage_of(last.run_dir), 20, group=alone()).manifest
    assert (manifest.world_size, dict(manifest.cursor)) == (
        2,
        {"step": 20, "epoch": 2, "samples": 480},
    )


# Signals


def test_sigterm_saves_and_leaves_a_due_evaluation_to_the_next_life(tmp_path: Path) -> None:
    """Evaluations at 4, 8, 10, ...: the life stops at step 8, which it has saved but not evaluated."""
    args = [
        "--eval-every",
        "4",
        "--early-stop.metric",
        "loss",
        "--early-stop.patience",
        "3",
        "--keep",
        "99",
        "--save-every",
        "4",
    ]
    whole = run(tmp_path / "whole", *args)
    assert whole.codes == [0, 0], whole.errors
    cut = run(tmp_path / "cut", *args, deaths="6:1:SIGTERM")
    assert cut.codes == [143, 143], cut.errors
    assert (cut.status["status"], cut.status["step"]) == ("preempted", 8)
    assert steps(storage_of(cut.run_dir)) == [8, 4]
    assert [record["step"] for record in records(cut.run_dir) if record["kind"] == "eval"] == [4]
    last = run(tmp_path / "cut", *args)
    assert last.status == whole.status
    assert records(last.run_dir) == records(whole.run_dir)
    assert steps(storage_of(last.run_dir)) == steps(storage_of(whole.run_dir))
    for step in steps(storage_of(whole.run_dir)):
        one, other = (
            open_checkpoint(storage_of(ended.run_dir), step, group=alone())
            for ended in (whole, last)
        )
        assert other.manifest.metrics == one.manifest.metrics, step
        assert other.values["best"] == one.values["best"], step
        assert other.values["early_stopping"] == one.values["early_stopping"], step


# What may change, and what is refused: one process is enough


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps that was stopped after 13; checkpoints at 3, 6, 9, 10, 12, 13, and where an evaluation was better."""
    path = tmp_path_factory.mktemp("first") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERY_STEP", "yes")
        patch.setattr("ddp_kit.distributed.control_packet.INTERVAL_S", 0.0)
        patch.setenv("DEATHS", "11:0:SIGTERM")
        # no evaluation at 12, which would be abandoned
        assert begin(path, "--keep", "99", "--eval-every", "5") == 143
    return path


@pytest.fixture
def stopped(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That run, to go on with."""
    monkeypatch.setenv("EVERY_STEP", "yes")
    monkeypatch.setattr("ddp_kit.distributed.control_packet.INTERVAL_S", 0.0)
    return shutil.copytree(first, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert begin(path) == 0
    return path


def begin(path: Path, *args: str) -> int:
    return main([MORTAL, *SMALL, "--run-dir", str(path), *args])


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "logs" not in path.parts
    }


def test_a_changed_setting_is_refused_with_a_table_unless_it_is_named(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(stopped)
    assert begin(stopped, "--lr", "0.01", "--grad-clip", "2", "--keep", "5") == 2
    said = capsys.readouterr().err
    assert "was started with other settings" in said
    rows = [line.split() for line in said.splitlines() if line.startswith("  ")]
    assert rows == [
        ["setting", "checkpoint", "now"],
        ["--grad-clip", "0.5", "2.0"],
        ["--lr", "0.05", "0.01"],
    ]
    assert "--change grad_clip lr" in said
    assert content(stopped) == before
    assert begin(stopped, "--lr", "0.01", "--grad-clip", "2", "--change", "lr") == 2
    assert "--lr" not in [
        line.split()[0] for line in capsys.readouterr().err.splitlines() if line.startswith("  ")
    ]


def test_what_is_free_may_change(stopped: Path) -> None:
    free = [
        "--keep",
        "2",
        "--save-every",
        "7",
        "--eval-every",
        "5",
        "--log-every",
        "2",
        "--num-workers",
        "1",
        "--threads",
        "1",
        "--no-tuning",
    ]
    assert begin(stopped, *free) == 0
    assert json.loads((stopped / "status.json").read_text())["step"] == 30


def test_a_rate_that_is_changed_by_name_goes_on_along_the_schedule(
    stopped: Path, whole: Path
) -> None:
    old = {record["step"]: record["lr"] for record in records(stopped) if record["kind"] == "train"}
    assert begin(stopped, "--lr", "0.01", "--change", "lr") == 0
    rates = {
        record["step"]: record["lr"] for record in records(stopped) if record["kind"] == "train"
    }
    usual = {record["step"]: record["lr"] for record in records(whole) if record["kind"] == "train"}
    assert [rates[step] for step in range(1, 14)] == [old[step] for step in range(1, 14)]
    assert [rates[step] for step in range(14, 31)] == pytest.approx(
        [usual[step] / 5 for step in range(14, 31)]
    )


def test_a_checkpoint_of_another_run_is_refused_unless_it_is_named(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = stopped.with_name("other")
    assert begin(other, "--seed", "1") == 0
    shutil.rmtree(other / "checkpoints")
    shutil.copytree(stopped / "checkpoints", other / "checkpoints")
    capsys.readouterr()
    assert begin(other, "--seed", "1") == 2
    assert "step-00000013 belongs to another run" in capsys.readouterr().err
    assert begin(other, "--resume", str(other / "checkpoints" / "step-00000013")) == 0


def test_resume_never_forbids_a_used_directory_and_nothing_else(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(stopped)
    assert begin(stopped, "--resume", "never") == 2
    assert "already holds a run (status preempted, step 13)" in capsys.readouterr().err
    assert content(stopped) == before
    assert begin(stopped.with_name("new"), "--resume", "never") == 0


@pytest.mark.parametrize("what", ["run", "folder", "checkpoint"])
def test_a_new_run_may_go_on_from_another_ones_checkpoint(
    stopped: Path, whole: Path, what: str
) -> None:
    path = {
        "run": stopped,
        "folder": stopped / "checkpoints",
        "checkpoint": stopped / "checkpoints" / "step-00000009",
    }[what]
    before = content(stopped)
    assert begin(stopped.with_name("copy"), "--resume", str(path)) == 0
    assert content(stopped) == before
    assert weights(stopped.with_name("copy")) == weights(whole)


def weights(run_dir: Path) -> str:
    found: str = json.loads((run_dir / "status.json").read_text())["weights_sha256"]
    return found


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of a life that did not happen: the next one must not go on from them, nor fail to save where they are."""
    monkeypatch.setenv("DEATHS", "9:0:SIGTERM")
    assert (
        begin(
            stopped,
            "--resume",
            str(stopped / "checkpoints" / "step-00000006"),
            "--lr",
            "0.01",
            "--change",
            "lr",
            "--keep",
            "99",
        )
        == 143
    )
    assert steps(storage_of(stopped))[0] == 10
    aside = [name for name in storage_of(stopped).list("") if name.endswith(".superseded")]
    assert {"step-00000009.superseded", "step-00000013.superseded"} <= set(aside)
    monkeypatch.setenv("DEATHS", "")
    assert begin(stopped, "--lr", "0.01") == 0
    failed = [
        event
        for event in map(json.loads, (stopped / "events.jsonl").read_text().splitlines())
        if event["event"] == "save_failed"
    ]
    assert not failed


@pytest.mark.parametrize("path", ["nowhere", "empty"])
def test_a_path_without_a_checkpoint_is_refused(
    stopped: Path, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped.with_name("empty").mkdir()
    assert begin(stopped.with_name("new"), "--resume", str(stopped.with_name(path))) == 2
    assert (
        f"--resume {stopped.with_name(path)}: expected a run, or one of its checkpoints"
        in capsys.readouterr().err
    )


def test_a_finished_run_says_so_and_is_left_as_it_is(
    stopped: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert begin(stopped) == 0
    before = content(stopped)
    capfd.readouterr()
    assert begin(stopped) == 0
    said = capfd.readouterr()
    assert "is finished already (step 30): nothing to do" in said.out + said.err
    assert content(stopped) == before


class Wide(nn.Sequential):
    """The same names with other shapes, one missing and one new."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 4, bias=False))
        self.extra = nn.Parameter(torch.zeros(3))


def test_a_model_of_other_shapes_is_refused_with_a_table_and_unchanged(tmp_path: Path) -> None:
    from stored import write

    settings = Settings()
    with process_group(device="cpu") as group:
        made = build(recipe(settings, model=plain), settings, group)
        state = state_of(made.training)
        write(LocalDisk(tmp_path), 4, tensors=state.tensors, values=state.values)
        made.training.control_packet.close()
        other = build(recipe(settings, model=Wide), settings, group)
        before = weights_sha256(other.training.model)
        with pytest.raises(ConfigError) as refusal:
            restore_state(open_checkpoint(LocalDisk(tmp_path), 4, group=alone()), other.training)
        assert weights_sha256(other.training.model) == before
        assert not other.training.objectives[0].optimizer.state
        other.training.control_packet.close()
    assert str(refusal.value).splitlines()[1:] == [
        "  shape       model/0.bias: here (20,), there (16,)",
        "  shape       model/0.weight: here (20, 6), there (16, 6)",
        "  unexpected  model/2.bias (4,)",
        "  shape       model/2.weight: here (4, 20), there (4, 16)",
        "  missing     model/extra (3,)   (the same? type --rename model/2.bias=model/extra)",
    ]


def test_a_recipe_whose_text_has_changed_is_refused_in_words_with_the_settings(
    tmp_path: Path,
) -> None:
    recipe = tmp_path / "mine.py"
    shutil.copy(MORTAL, recipe)
    given = ["--width", "16", "--epochs", "1", "--max-steps", "4", "--save-every", "2"]
    assert train(*given, folder=tmp_path, world_size=1, recipe=str(recipe), limit_s=60).codes == [0]
    recipe.write_text(recipe.read_text() + "\n# another text\n")
    changed = train(*given, "--lr", "0.5", folder=tmp_path, world_size=1, recipe=str(recipe))
    assert changed.codes == [2]
    assert "Type them as they were, or --change lr recipe to go on" in changed.errors
    goes_on = [*given, "--lr", "0.5", "--change", "lr", "recipe"]
    assert train(*goes_on, folder=tmp_path, world_size=1, recipe=str(recipe)).codes == [0]
