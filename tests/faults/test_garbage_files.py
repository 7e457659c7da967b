"""Garbage in the files of one run takes no listing from the others, and reaches no terminal as it is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddp_kit.cli import show
from ddp_kit.cli import sweep as sweep_table
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.launch.runs import jobs, logs
from ddp_kit.lifecycle.run_dir import is_in_use

ESCAPE = "\x1b]0;owned\x07\x1b[2J"
NESTED = "[" * 100_000
GARBAGE = {
    "an infinite step": {"status.json": '{"status": "running", "step": "9e999", "epoch": 9e999}'},
    "an infinite number": {
        "status.json": '{"status": "running", "step": 9e999}',
        "metrics.jsonl": '{"kind": "train", "step": 9e999, "loss": 1.0}\n{"kind": "eval", "step": 1e400, "loss": 1.0}',
    },
    "many digits": {
        "status.json": f'{{"step": {"9" * 9_000}}}',
        "metrics.jsonl": f'{{"kind": "train", "step": {"9" * 400}, "loss": {"9" * 400}}}\n{{"kind": "train", "step": 1, "loss": {"9" * 400}, "samples_per_s": {"9" * 400}}}',
    },
    "brackets": {"status.json": NESTED, "metrics.jsonl": NESTED, "events.jsonl": NESTED},
    "a lock": {
        "status.json": '{"status": "running"}',
        "run.lock": '{"host": "h", "pid": "9e999", "start": "", "namespace": "", "job": "", "restart": []}',
    },
    "other kinds": {
        "status.json": '{"status": ["running"], "step": {"a": 1}, "reason": [[]], "metrics": 3}',
        "metrics.jsonl": '{"kind": ["train"], "step": true, "loss": []}\n{"kind": "eval", "loss": 1.0}\n[]',
        "events.jsonl": '{"event": ["start"]}\n{"event": "failure", "message": [1]}',
        "launch/jobs.jsonl": '{"job": [1]}\n{"folder": 3}\n7',
        "checkpoints/step-²/manifest.json": "{}",
    },
    "escapes": {
        "status.json": json.dumps({"status": f"failed{ESCAPE}", "reason": ESCAPE, "step": 3}),
        "metrics.jsonl": json.dumps({"kind": "eval", "step": 3, f"loss{ESCAPE}": 1.0}),
        "events.jsonl": json.dumps({"event": "failure", "message": ESCAPE, "step": ESCAPE}),
        "settings.json": json.dumps({"recipe": ESCAPE, "settings": {ESCAPE: ESCAPE}}),
        "logs/rank-0.log": f"2026-01-01 10:00:00,000 INFO {ESCAPE} said\tit",
        "launch/jobs.jsonl": json.dumps({"job": ESCAPE, "folder": "nowhere"}),
    },
}


def a_run(folder: Path, files: dict[str, str]) -> Path:
    for name, text in ({"settings.json": "{}"} | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run as it should be."""
    for module in ("found", "lookup", "jobs"):
        monkeypatch.setattr(f"ddp_kit.launch.runs.{module}.has_slurm", lambda: False)
    good = {
        "status.json": '{"status": "finished", "step": 8}',
        "metrics.jsonl": '{"kind": "eval", "step": 8, "loss": 0.5}',
    }
    a_run(tmp_path / "good", good)
    return tmp_path


def is_safe(text: str) -> bool:
    return not any(letter in text for letter in "\x1b\x07")


@pytest.mark.parametrize("kind", GARBAGE)
def test_one_runs_garbage_hides_no_other_run_and_reaches_no_terminal_raw(
    kind: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = a_run(runs / "bad", GARBAGE[kind])
    (runs / "sweep.json").write_text('{"runs": {"good": {"lr": "1"}, "bad": {"lr": "[/]"}}}')
    commands: dict[str, Callable[[], Any]] = {
        "jobs": lambda: jobs.main([str(runs)]),
        "show": lambda: show.main([str(bad)]),
        "logs": lambda: logs.main([str(bad)]),
        "sweep": lambda: sweep_table.main([str(runs)]),
    }
    for name, command in commands.items():
        assert command() == 0
        said = capsys.readouterr().out
        assert is_safe(said), (name, said)
        if name in ("jobs", "sweep"):
            assert "finished" in said
            assert any(word in said for word in ("bad", "[/]"))
    assert not is_in_use(bad)


def test_what_is_no_json_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text(f'{NESTED}\n{{"step": {"9" * 9_000}}}\n{{"step": 1}}\n')
    assert list(read_lines(path)) == [{"step": 1}]
    path.write_text(NESTED)
    assert read_json(path) == {}
