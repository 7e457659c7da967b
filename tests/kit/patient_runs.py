"""Runs of `patient.py`, a recipe that is asked to stop or to save in many ways, and what they leave."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launching import Ended, train
from paths import KIT

from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import steps

PATIENT = str(KIT / "patient.py")
REQUEUE = {"DDP_KIT_REQUEUE": "1"}
LONG = ("--max-steps", "1000")


def run(folder: Path, *args: str, world_size: int = 2, **env: str) -> Ended:
    """Runs the recipe once in `folder`; `env` tells it what to do, and its launcher's part."""
    folder.mkdir(exist_ok=True)
    return train(*args, folder=folder, recipe=PATIENT, world_size=world_size, env=env, limit_s=30)


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    """The events of some kinds, of all kinds if none is given."""
    found = map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())
    return [event for event in found if event["event"] in kinds or not kinds]


def saved(run_dir: Path) -> list[int]:
    """The steps of the checkpoints, the last one first."""
    return steps(LocalDisk(run_dir / "checkpoints"))


def ended_at(ended: Ended) -> list[str]:
    """Where each rank's callback saw the end."""
    found = []
    for output in ended.outputs:
        found += [line for line in output.splitlines() if line.startswith("ended after ")]
    return found


def kinds(run_dir: Path, kind: str) -> list[int]:
    """The steps of the metrics of one kind."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == kind]


@contextmanager
def torchrun(folder: Path, *, restarts: str = "0", **env: str) -> Iterator["subprocess.Popen[str]"]:
    """Starts the recipe on two ranks under torchrun itself. Killed at the end."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        restarts,
        "-m",
        "ddp_kit.train",
        PATIENT,
    ]
    path = os.pathsep.join(map(str, (Path(PATIENT).parents[1], Path(PATIENT).parent)))
    given = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    words = [*command, *LONG, "--save-every", "2", "--run-dir", str(folder / "run")]
    with subprocess.Popen(
        words,
        env=given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as agent:
        yield agent
        agent.kill()
