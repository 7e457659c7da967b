"""`python -m ddp_kit.train` on forked ranks, and everything a user would see of it."""

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paths import KIT

from ddp_kit.testing import start_ranks

FAULTY = str(KIT / "faulty.py")
LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended on all ranks: exit codes, stdout by rank, stderr as one stream in order of time."""

    codes: list[int]
    outputs: list[str]
    errors: str
    run_dir: Path

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return found

    def is_clean(self) -> bool:
        """Whether the run directory is not there, or is whole: a final status, no lock, nothing temporary."""
        if not self.run_dir.exists():
            return True
        left = [
            path.name
            for path in self.run_dir.rglob("*")
            if path.name == "run.lock" or path.name.endswith(".tmp")
        ]
        return not left and self.status["status"] != "running"


def train_on_rank(args: Sequence[Sequence[str]], errors: str) -> None:
    """The command as one rank runs it, with its stderr in the stream that all ranks share, as torchrun has it."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    from ddp_kit.train import main

    sys.exit(main(args[int(os.environ["RANK"])]))


def train(
    *args: str,
    folder: Path,
    world_size: int = 2,
    recipe: str = FAULTY,
    others: Mapping[int, Sequence[str]] | None = None,
    env: Mapping[str, str | None] | None = None,
    limit_s: float = LIMIT_S,
) -> Ended:
    """Runs a recipe with flags on ranks, `others` replacing the whole command line of single ranks, in a new run directory.

    Every rank must end by itself within `limit_s` seconds.
    """
    run_dir, errors = folder / "run", folder / "errors"
    own = [recipe, *args, *([] if "--run-dir" in args else ["--run-dir", str(run_dir)])]
    commands = [list((others or {}).get(rank, own)) for rank in range(world_size)]
    with start_ranks(
        train_on_rank, world_size, commands, str(errors), group=False, env=env, deadline_s=limit_s
    ) as ranks:
        begin = time.monotonic()
        reports = ranks.wait()
        late = [
            f"rank {report.rank} did not end:\n{report.stacks}"
            for report in reports
            if report.outcome == "late"
        ]
        assert not late, "\n".join([*late, *errors.read_text().splitlines()[-20:]])
        assert time.monotonic() - begin < limit_s
    return Ended(
        codes=[report.exit_code for report in reports],
        outputs=[report.output for report in reports],
        errors=errors.read_text(),
        run_dir=run_dir,
    )
