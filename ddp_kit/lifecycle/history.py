"""What earlier attempts of a run left: how far they came, and whether this job goes in circles.

It is read from status.json, metrics.jsonl and events.jsonl, by rank 0; the others are told. A job
that SLURM, torchrun's agent or a batch script of one's own starts again and again without a new
step would use up its hours for nothing, so it ends. A start by hand is never refused: it is another
job. Lives are told apart by how often they were started again, never by a clock.
"""

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import DdpKitError
from ddp_kit.io.json_lines import read_json, read_lines
from ddp_kit.io.process import process_start
from ddp_kit.io.redact import redact_text

MOST_FRUITLESS = 3
BEGINNINGS = ("start", "resume")
# A life that may be one of several takes the run directory: it may never come to a beginning.
CLAIM = "claim"
ENDINGS = ("stop", "failure", "finish")
REQUEUE = 75
LONGEST = 160  # characters of what a life ended by
# Of which job a life is, and the how-manyth of it.
JOB = ("job", "cluster", "agent", "by_request")
ORDER = ("restart", "agent_restart")


class NoProgressError(DdpKitError):
    """A job goes round in circles, and is not to be started again."""


@dataclass(kw_only=True)
class Life:
    """An earlier attempt of this job: at which step it began, if it came so far, and its end."""

    facts: Mapping[str, object]
    step: int | None = None
    ending: str = ""
    # It has left a later checkpoint than the one it began with.
    has_saved: bool = False

    @property
    def order(self) -> list[int]:
        """By which lives of a job follow each other."""
        return _order(self.facts)


def job_facts(path: Path | None = None) -> dict[str, object]:
    """Returns what an attempt's events say of the job that it is a life of: {} without one.

    A job of SLURM is one, the ranks of a torchrun agent that restarts them, and the starts of a
    launcher that does as DDP_KIT_REQUEUE asks.

    Args: `path` the run directory before this attempt has claimed it: there the lives of such a
        launcher are counted.
    """
    facts: dict[str, object] = {}
    job = environment().get("SLURM_JOB_ID", "")
    if job:
        facts["job"] = job
        facts["restart"] = restart_count()
        facts["cluster"] = environment().get("SLURM_CLUSTER_NAME", "")
    if environment().get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
        # In a job of SLURM each of its lives has an agent of its own.
        if not job:
            facts["agent"] = agent()
        facts["agent_restart"] = _number("TORCHELASTIC_RESTART_COUNT")
    if not facts and path is not None and environment().get("DDP_KIT_REQUEUE") == "1":
        facts["by_request"] = True
        facts["restart"] = _requests(path)
    return facts


def _requests(path: Path) -> int:
    """Returns how often a launcher has been asked, without a start by hand in between, to start
    this run again.
    """
    is_asked = (path / "requeue").exists()
    if not is_asked and read_json(path / "status.json").get("exit_code") != REQUEUE:
        return 0
    last = 0
    for event in read_lines(path / "events.jsonl"):
        if event.get("event") == CLAIM:
            last = _order(event)[0] if event.get("by_request") else 0
    return last + 1


def agent() -> str:
    """Returns this process's parent, which under torchrun starts every attempt of a run."""
    return f"{socket.gethostname()} {os.getppid()} {process_start(os.getppid())}"


def whole_name_of_job() -> str:
    """Returns this SLURM job as no other cluster has one, for instance "17@cluster"; the number
    alone without its name, "" outside jobs.
    """
    job = environment().get("SLURM_JOB_ID", "")
    cluster = environment().get("SLURM_CLUSTER_NAME", "")
    if job and cluster:
        return f"{job}@{cluster}"
    return job


def restart_count() -> int:
    """Returns how often SLURM has started this job again."""
    return _number("SLURM_RESTART_COUNT")


def _number(name: str) -> int:
    text = environment().get(name, "")
    return int(text) if text.isdigit() else 0


def last_step(path: Path, status: Mapping[str, object]) -> int:
    """Returns the last step that the attempt before is known to have done.

    Args: `status` is the content of its status.json.
    """
    records: list[Mapping[str, object]] = []
    for event in read_lines(path / "events.jsonl"):
        # Of the last attempt only.
        if event.get("event") in BEGINNINGS:
            records = []
        records.append(event)
    for record in read_lines(path / "metrics.jsonl"):
        if record.get("kind") == "train":
            records.append(record)
    steps = []
    for entry in [status, *records]:
        step = entry.get("step", 0)
        if isinstance(step, int):
            steps.append(step)
    return max(steps)


def note(path: Path, event: str, facts: Mapping[str, object], *, message: str = "") -> None:
    """Adds an event of a life that has no reporter yet. Rank 0 calls it."""
    record = {"event": event, "rank": 0, **facts}
    if message:
        record["message"] = redact_text(message)
    with (path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def lives_of_job(path: Path, facts: Mapping[str, object]) -> list[Life]:
    """Returns this job's earlier attempts in their order; [] unless it was started again.

    Another job of that number is none of it: one of another cluster, or one from before the
    cluster's count began anew.

    Args: `facts` this attempt's.
    """
    own = _order(facts)
    if not any(own):
        return []
    lives: list[Life] = []
    current: Life | None = None
    for event in read_lines(path / "events.jsonl"):
        kind = event.get("event")
        if kind == CLAIM or kind in BEGINNINGS:
            current = _life_of(event, facts, lives)
        elif current is not None:
            _take(current, event)
    if lives and lives[-1].order > own:
        return []
    # What this very attempt has noted is none of them.
    return [life for life in lives if life.order != own]


def _life_of(
    event: Mapping[str, object], facts: Mapping[str, object], lives: list[Life]
) -> Life | None:
    """Returns the life that an event is of, which it may begin in `lives`; None for another job."""
    for name in JOB:
        if event.get(name, facts.get(name) if name == "cluster" else None) != facts.get(name):
            return None
    if lives and _order(event) < lives[-1].order:
        lives.clear()
    is_first = not lives or lives[-1].order != _order(event) or lives[-1].step is not None
    if is_first:
        lives.append(Life(facts=event))
    lives[-1].step = _step_of(event)
    return lives[-1]


def _take(life: Life, event: Mapping[str, object]) -> None:
    """Takes an event of a life."""
    step = _step_of(event)
    if event.get("event") in ENDINGS:
        life.ending = str(event.get("message", event["event"]))
        # It was refused before it had begun.
        if life.step is None:
            life.step = step
    if event.get("event") == "save" and step is not None and life.step is not None:
        life.has_saved |= step > life.step


def _step_of(event: Mapping[str, object]) -> int | None:
    found = event.get("step")
    return found if isinstance(found, int) else None


def _order(facts: Mapping[str, object]) -> list[int]:
    counts = []
    for name in ORDER:
        found = facts.get(name)
        counts.append(found if isinstance(found, int) else 0)
    return counts


def fruitless(lives: Sequence[Life]) -> list[Life]:
    """Returns the lives after the last one that has left a later checkpoint than it found."""
    last: list[Life] = []
    for life in lives:
        if life.has_saved:
            last = []
        else:
            last.append(life)
    return last


def require_progress(
    starts: Sequence[int | None], *, step: int, endings: Sequence[str] = ()
) -> None:
    """Called at the beginning of an attempt at `step`.

    Args: `starts`, `endings` where the attempts before began, and what they ended by.
    Raises: NoProgressError if the last three of them began there too, or never did.
    """
    last = list(starts[-MOST_FRUITLESS:])
    if len(last) < MOST_FRUITLESS or step not in last or set(last) - {step, None}:
        return
    raise NoProgressError(
        f"{MOST_FRUITLESS} lives of this job have begun at step {step} and none has left a "
        f"later checkpoint, so this one ends here. {_ended(endings)}"
        "events.jsonl and logs/ say more; a smaller --save-every or --save-minutes "
        "keeps more. Another job may go on."
    )


def require_progress_so_far(
    starts: Sequence[int | None], *, began: int | None, endings: Sequence[str]
) -> None:
    """Called before a launcher is asked for another attempt, by one that did no new step.

    Args: `starts` of the attempts before; `began` where this one has begun, None if it has not;
        `endings` what they ended by, this one's too.
    Raises: NoProgressError if this one is the third like that.
    """
    last = [*starts, began][-MOST_FRUITLESS:]
    if len(last) < MOST_FRUITLESS or len(set(last) - {None}) > 1:
        return
    raise NoProgressError(
        f"{MOST_FRUITLESS} lives of this job have done no new step, so it is not requeued. "
        f"{_ended(endings)}"
        "Ask for more time or a longer warning, or mend what takes it all before the first step. "
        "Another job may go on."
    )


def _ended(endings: Sequence[str]) -> str:
    if not endings:
        return ""
    numbered = []
    for number, ending in enumerate(endings[-MOST_FRUITLESS:], start=1):
        text = ending or "no word (killed)"
        numbered.append(f"({number}) {text.splitlines()[0][:LONGEST]}")
    return f"They ended by: {'; '.join(numbered)}. "
