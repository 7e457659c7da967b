"""`ddp-kit show`: one screen about any run directory, and a clear word about any other."""

import math
from pathlib import Path

import pytest

from ddp_kit.cli import main
from ddp_kit.cli.plot import draw
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.settings import EarlyStop, Settings, to_json
from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.jsonl import JsonlTracker

STEPS = 200


@pytest.fixture
def run(tmp_path):
    """A finished run of 200 steps, evaluated every 50."""
    run = RunDir(tmp_path / "runs" / "digits-1")
    run.claim()
    defaults = Settings(global_batch=128, epochs=4)
    chosen = Settings(
        global_batch=256, epochs=4, early_stop=EarlyStop(metric="accuracy", mode="max")
    )
    document = {
        "recipe": "recipes/digits.py",
        "settings": {**to_json(chosen), "lr": 0.2},
        "defaults": {**to_json(defaults), "lr": 0.1},
    }
    run.write_json("settings.json", document)
    write_records(run)
    run.status(
        "finished",
        step=STEPS,
        epoch=4,
        metrics={"accuracy": 0.9},
        weights_sha256="ab" * 32,
        exit_code=0,
    )
    run.release()
    return run


def write_records(run):
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir=run.path, name="digits"))
    tracker.event({"event": "start", "step": 0, "rank": 0})
    for step in range(10, STEPS + 1, 10):
        loss = 2.0 * math.exp(-step / 30) + 0.1
        tracker.log(
            {
                "kind": "train",
                "step": step,
                "epoch": step // 50,
                "loss": loss,
                "lr": 0.2,
                "samples_per_s": 5000.0,
            }
        )
        if step % 50 == 0:
            accuracy = 0.95 if step == 100 else 0.9
            tracker.log(
                {
                    "kind": "eval",
                    "step": step,
                    "epoch": step // 50,
                    "loss": loss + 0.05,
                    "accuracy": accuracy,
                }
            )
    tracker.finish({})


def show(path, capsys):
    """The lines that `ddp-kit show` prints, in pytest's pipe."""
    assert main.main(["show", str(path)]) == 0
    return capsys.readouterr().out.splitlines()


def row(lines, name):
    return next(line.removeprefix(name).strip() for line in lines if line.startswith(name))


def test_one_screen_tells_settings_status_metrics_and_best(run, capsys):
    lines = show(run.path, capsys)
    assert len(lines) <= 30
    assert row(lines, "run").endswith("recipes/digits.py")
    changed = "global_batch 256 (default 128), early_stop.metric accuracy (default none), early_stop.mode max (default min), lr 0.2 (default 0.1)"
    assert row(lines, "settings") == changed
    assert row(lines, "status") == "finished at step 200, epoch 4"
    assert row(lines, "weights") == "sha256 " + "ab" * 32
    assert row(lines, "last") == "step 200  epoch 4  loss 0.1025  lr 0.2  5,000 samples/s"
    assert row(lines, "best") == "eval  loss 0.1525 (step 200)  accuracy 0.95 (step 100)"
    assert any("● eval loss" in line for line in lines)
    assert sum(line.count("●") for line in lines) == 1 + 4


def test_the_curve_falls_as_the_loss_does(run, capsys):
    lines = [line for line in show(run.path, capsys) if "┤" in line]
    first, last = lines[0].partition("┤")[2], lines[-1].partition("┤")[2]
    assert first.strip()
    assert last.strip()
    assert len(first.rstrip()) < len(last) - len(last.lstrip()), (
        "top row on the left, bottom row on the right"
    )


def test_into_a_pipe_there_are_no_control_characters_and_nothing_is_changed(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    lines = show(run.path, capsys)
    assert all(character.isprintable() for line in lines for character in line)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_torn_last_line_and_a_loss_that_is_no_number_are_borne(run, capsys):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "train", "step": 210, "epoch": 4, "loss": "nan", "lr": 0.2}\n{"kind": "train", "step": 22'
        )
    lines = show(run.path, capsys)
    assert row(lines, "last") == "step 210  epoch 4  loss nan  lr 0.2"
    assert any("┤" in line for line in lines)


def test_a_failed_run_names_rank_and_message(run, capsys):
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir=run.path, name="digits"))
    tracker.event(
        {
            "event": "failure",
            "step": 42,
            "rank": 3,
            "message": "Traceback ...\nValueError: label 10 is out of range",
        }
    )
    tracker.finish({})
    run.status("failed", reason="an exception on rank 3", step=42, exit_code=1)
    lines = show(run.path, capsys)
    assert row(lines, "status") == "failed (an exception on rank 3) at step 42, epoch 0"
    assert row(lines, "failure") == "rank 3 at step 42  ValueError: label 10 is out of range"


def test_a_run_that_lives_and_one_that_was_killed_are_told_apart(tmp_path, capsys):
    run = RunDir(tmp_path / "run")
    run.claim()
    run.status("running", step=3)
    assert row(show(run.path, capsys), "status") == "running at step 3, epoch 0"
    assert row(show(run.path, capsys), "last") == "no train record yet"
    run.release()
    assert "it was killed" in row(show(run.path, capsys), "status")


def test_several_evaluation_sets_stand_side_by_side(tmp_path, capsys):
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir=tmp_path, name="x"))
    for step in (10, 20):
        losses = {f"{name}/loss": 1.0 / step for name in ("seen", "unseen")}
        tracker.log(
            {"kind": "eval", "step": step, "epoch": 0, **losses, "unseen/perplexity": 30.0 - step}
        )
    tracker.log({"kind": "test", "step": 20, "loss": 0.5})
    tracker.finish({})
    lines = show(tmp_path, capsys)
    assert (
        row(lines, "best")
        == "eval  seen/loss 0.05 (step 20)  unseen/loss 0.05 (step 20)  unseen/perplexity 10 (step 20)"
    )
    assert "          test  step 20  loss 0.5" in lines
    assert "          ● eval seen/loss   ▲ eval unseen/loss   ■ test loss" in lines


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "runs/digits-2",
            "does not exist. Did you mean {runs}/digits-1? Runs nearby: {runs}/digits-1",
        ),
        ("runs", "holds runs but is none itself. Type one of them: {runs}/digits-1"),
        (
            "empty",
            "is no run directory (it has no status.json, metrics.jsonl or settings.json). Type the folder that --run-dir named.",
        ),
    ],
)
def test_what_is_no_run_is_refused_with_the_runs_nearby(
    run, tmp_path, capsys, monkeypatch, typed, said
):
    monkeypatch.chdir(Path("/"))
    (tmp_path / "empty").mkdir()
    assert main.main(["show", str(tmp_path / typed)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"ddp-kit: {tmp_path / typed}: {said.format(runs=tmp_path / 'runs')}\n"


def test_a_plot_spans_its_frame_whatever_the_values():
    for values in ([5.0], [1.0, 1.0], [-2.0, 3.0], [1e-6, 1e6], [math.nan, 1.0, math.inf]):
        rows = draw(list(enumerate(values)), {}, width=40, height=5)
        assert len(rows) == 7
        assert all(len(row) <= 40 for row in rows)
        assert any(0x2800 < ord(character) < 0x2900 for row in rows for character in row)
    assert draw([(0.0, math.nan)], {}, width=40, height=5) == []


def test_a_hundredfold_fall_is_drawn_on_a_logarithmic_axis():
    line = [(float(step), 100.0 * 10 ** (-step / 50)) for step in range(101)]
    rows = draw(line, {}, width=61, height=11)
    assert "logarithmic" in rows[-1]
    assert rows[5].strip().startswith("10 ┤"), "the geometric middle"
    middle = rows[5].partition("┤")[2]
    assert abs((len(middle.rstrip()) + len(middle) - len(middle.lstrip())) / 2 - 25) < 3, (
        "a straight line through the centre"
    )
