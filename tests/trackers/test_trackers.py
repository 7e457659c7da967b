"""Trackers: what reaches a file, a terminal and a pipe, and what must not."""

import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from cases import Settings, recipe
from paths import ROOT

import ddp_kit
from ddp_kit.errors import MissingPackageError
from ddp_kit.io.json_lines import json_text, read_lines
from ddp_kit.io.logs import REDACTED
from ddp_kit.io.redact import redact
from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.trackers.tensorboard import TensorBoardTracker
from ddp_kit.trackers.wandb import has_key

TRAIN = {
    "kind": "train",
    "step": 10,
    "epoch": 0,
    "samples": 5120,
    "loss": 0.5,
    "lr": 0.1,
    "samples_per_s": 1234.5,
    "data_wait": 0.01,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")
SECRETS = ("0123456789abcdef" * 3)[:40], "hunter2-hunter2", "hf_" + "a" * 34


def run_python(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process, with its output in pipes."""
    words = [sys.executable, "-c", code, *arguments]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **environ}
    return subprocess.run(
        words, capture_output=True, text=True, check=True, timeout=60, env=environ
    )


# JSON lines


def test_each_record_is_one_line_of_strict_json(tmp_path):
    tracker = JsonlTracker()
    tracker.start(RunInfo(run_dir=tmp_path, name="x"))
    record = {
        **TRAIN,
        "loss": float("nan"),
        "low": float("-inf"),
        "high": np.float32("inf"),
        "a": torch.tensor(2.5),
        "b": np.int64(3),
    }
    tracker.log(record)
    tracker.event({"event": "start", "message": "two\nlines"})
    lines = (
        (tmp_path / "metrics.jsonl").read_text().splitlines()
    )  # before finish: each line is flushed
    events = (tmp_path / "events.jsonl").read_text().splitlines()
    tracker.finish({})
    refuse = pytest.fail
    found = json.loads(lines[0], parse_constant=refuse)
    assert found == {**TRAIN, "loss": "nan", "low": "-inf", "high": "inf", "a": 2.5, "b": 3}
    assert (len(lines), len(events)) == (1, 1)


def test_a_later_life_appends_and_a_torn_line_costs_only_itself(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json_text(TRAIN) + "\n" + '{"kind": "train", "st')
    for step in (20, 30):
        tracker = JsonlTracker()
        tracker.start(RunInfo(run_dir=tmp_path, name="x"))
        tracker.log({**TRAIN, "step": step})
        tracker.finish({})
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [10, 20, 30]


def test_what_is_no_number_or_text_is_refused_rather_than_written(tmp_path):
    with pytest.raises(TypeError):
        json_text({"model": object()})


def test_records_of_long_steps_are_in_the_file_one_step_later_and_those_of_short_ones_are_not_lost(
    tmp_path,
):
    """The second run is ended by an error: what was logged until then stands before the failure's event."""
    seen = []

    class Looking:
        def __init__(self, pause_s: float, fails_at: int = 0):
            self.pause_s, self.fails_at = pause_s, fails_at

        def on_start(self, model: object) -> None: ...

        def on_step(self, step: int) -> None:
            seen.append(
                (step, [record["step"] for record in read_lines(tmp_path / "long/metrics.jsonl")])
            )
            time.sleep(self.pause_s)
            if step == self.fails_at:
                raise RuntimeError("the observer's own")

        def on_evaluation(self, step: int, metrics: object) -> None: ...

        def on_end(self, reason: str) -> None: ...

    settings = Settings(max_steps=4, log_every=1, run_dir=str(tmp_path / "long"))
    ddp_kit.run(recipe(settings, callbacks=[Looking(0.12)]), settings)
    assert seen[1:] == [(2, [1]), (3, [1, 2]), (4, [1, 2, 3])]
    settings = Settings(max_steps=9, log_every=1, run_dir=str(tmp_path / "short"))
    with pytest.raises(RuntimeError, match="observer"):
        ddp_kit.run(recipe(settings, callbacks=[Looking(0, fails_at=6)]), settings)
    assert [record["step"] for record in read_lines(tmp_path / "short/metrics.jsonl")] == [
        1,
        2,
        3,
        4,
        5,
    ]


# secrets


@pytest.mark.parametrize(
    "name",
    [
        "password",
        "wandb_api_key",
        "hfToken",
        "HF_TOKEN",
        "aws-secret-access-key",
        "db_passwd",
        "credentials",
        "auth",
        "key",
    ],
)
def test_a_value_under_the_name_of_a_secret_is_redacted(name):
    assert redact({name: "hunter2"}) == {name: REDACTED}
    assert redact({"outer": [{name: "hunter2"}]}) == {"outer": [{name: REDACTED}]}
    assert redact({"argv": ["--lr", "1", f"--{name}", "hunter2"]}) == {
        "argv": ["--lr", "1", f"--{name}", REDACTED]
    }
    assert redact({"message": f"ran with --{name}=hunter2 and failed"}) == {
        "message": f"ran with --{name}={REDACTED} and failed"
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter2@host/x.git", f"https://{REDACTED}@host/x.git"),
        ("s3://AKIAABCDEFGHIJKLMNOP/x", f"s3://{REDACTED}/x"),
        (
            "https://host/x?width=3&api_key=hunter2&y=1",
            f"https://host/x?width=3&api_key={REDACTED}&y=1",
        ),
        ("https://host/blob?sig=hunter2", f"https://host/blob?sig={REDACTED}"),
        ("Authorization: Bearer abcdefgh12345678", f"Authorization: Bearer {REDACTED}"),
        ("{'password': 'hunter2'}", f"{{'password': '{REDACTED}'}}"),
        (SECRETS[0], REDACTED),
        (f"token {SECRETS[2]} refused", f"token {REDACTED} refused"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.abcdefghijk", REDACTED),
        ("ghp_" + "b" * 36, REDACTED),
    ],
)
def test_a_value_that_looks_like_a_secret_is_redacted_under_any_name(text, expected):
    assert redact({"note": text}) == {"note": expected}


def test_what_is_no_secret_stays_as_it_is():
    harmless = {
        "pad_token": "<pad>",
        "max_tokens": 512,
        "tokenizer": "gpt2",
        "num_key_value_heads": 8,
        "sort_key": "length",
        "key": 7,
        "token": "",
        "revision": SECRETS[0],
        "recipe_sha256": "ab" * 32,
        "init_from": "ssh://git@host/weights.safetensors",
        "path": f"snapshots/{SECRETS[0]}/model.safetensors",
        "lr": 0.1,
        "tags": [],
        "message": "missing key: layer1.weight, step=3",
    }
    assert redact(harmless) == harmless


LIVES = """
import os, sys
from pathlib import Path
import numpy as np
import wandb
from ddp_kit.io.logs import rank_log
from ddp_kit.settings import Wandb
from ddp_kit.io.redact import redact
from ddp_kit.trackers import RunInfo
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.trackers.wandb import WandbTracker
run_dir, key, password, note = Path(sys.argv[1]), *sys.argv[2:5]
settings = redact({"lr": 0.1, "hf_token": key, "db_password": password, "note": note})

def life(step):
    trackers = [JsonlTracker(), WandbTracker(Wandb(project="p", tags=("a",), mode="offline"))]
    for tracker in trackers:
        tracker.start(RunInfo(run_dir=run_dir, name="digits", settings=settings))
        tracker.log({"kind": "train", "step": step, "epoch": 0, "loss": 0.5})
        tracker.event({"event": "failure", "step": step, "message": f"login with {note} failed, password={password}"})
        tracker.sample("picture", np.full((3, 8, 8), 0.5), step=step)
        tracker.sample("words", "a <text>", step=step)
        tracker.finish({"status": "finished", "step": step})

for step in (10, 20):
    child = os.fork()  # a life is a process of its own; the imports are paid once
    if child == 0:
        with rank_log(run_dir / "logs", rank=0):
            life(step)
        wandb.teardown()
        os._exit(0)  # not sys.exit: wandb would remove a temporary folder that the next life has inherited
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.fixture(scope="module")
def two_lives(tmp_path_factory):
    """A run directory after two lives tracked into it one after the other, with secrets in flags and environment."""
    run_dir = tmp_path_factory.mktemp("runs") / "digits-1"
    run_dir.mkdir()
    process = run_python(LIVES, str(run_dir), *SECRETS, WANDB_API_KEY=SECRETS[0])
    settings = redact({"hf_token": SECRETS[0], "db_password": SECRETS[1], "note": SECRETS[2]})
    for step in (10, 20):  # here, where torch is imported already
        tracker = TensorBoardTracker()
        tracker.start(RunInfo(run_dir=run_dir, name="digits", settings=settings))
        tracker.log({"kind": "train", "step": step, "epoch": 0, "loss": 0.5})
        tracker.event({"event": "failure", "step": step, "message": f"password={SECRETS[1]}"})
        tracker.sample("picture", torch.full((3, 8, 8), 0.5), step=step)
        tracker.sample("words", "a <text>", step=step)
        tracker.finish({"status": "finished", "step": step})
    return run_dir, process


def test_wandb_offline_keeps_one_id_for_all_lives_and_steps_as_their_own_axis(two_lives):
    run_dir, process = two_lives
    kept = (run_dir / "wandb_id").read_text().strip()
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert {file.name for file in files} == {f"run-{kept}.wandb"}
    for file, step in zip(files, (b"10", b"20"), strict=True):
        written = file.read_bytes()
        assert all(part in written for part in (b"train/loss", b"step", step, b"digits-1"))
        assert {path.suffix for path in file.parent.glob("files/media/*/samples/*")} == {
            ".html",
            ".png",
        }
    assert process.stdout.count("wandb sync") == 2
    assert (CONTROL.search(process.stdout), process.stderr) == (None, "")


def test_no_secret_reaches_any_file_of_any_tracker(two_lives):
    run_dir, _ = two_lives
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) >= 6
    leaks = [
        (path.name, secret)
        for path in files
        for secret in SECRETS
        if secret.encode() in path.read_bytes()
    ]
    assert leaks == []


def test_wandb_is_offline_without_a_key_and_online_with_one(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine elsewhere.example login user password x\n")
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x\n")
    assert has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert has_key()


# TensorBoard


def test_tensorboard_reads_back_what_was_logged(two_lives):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir, _ = two_lives
    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert {"train/loss", "train/epoch"} <= set(tags["scalars"])
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (10, 0.5),
        (20, 0.5),
    ]
    assert tags["images"] == ["picture"]
    assert "words/text_summary" in tags["tensors"]


def test_a_missing_tracker_package_gives_the_install_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'ddp_kit\[tensorboard\]'"):
        TensorBoardTracker().start(RunInfo(run_dir=tmp_path, name="x"))
    assert list(tmp_path.iterdir()) == []
