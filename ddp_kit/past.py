"""What earlier lives of a run left: how far they came, and whether this job goes round in circles.

Owns: reading that from status.json, metrics.jsonl and events.jsonl. Rank 0 reads, the others are told.
Refuses: a job that SLURM starts again and again without a new step. A start by hand is never refused: it is another job.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_kit.errors import DdpKitError
from ddp_kit.topology import environment
from ddp_kit.trackers.jsonl import read_lines

FRUITLESS_LIVES = 3
BEGINNINGS = ("start", "resume")


def job_facts() -> dict[str, object]:
    """Returns what the event at a life's beginning says of its SLURM job: {} outside one."""
    environ = environment()
    job = environ.get("SLURM_JOB_ID", "")
    return {"job": job, "restart": restart_count()} if job else {}


def restart_count() -> int:
    """Returns how often SLURM has started this job again."""
    text = environment().get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def last_step(path: Path, status: Mapping[str, object]) -> int:
    """Returns the last step that the life before is known to have done."""
    events: list[dict[str, object]] = []
    for event in read_lines(path / "events.jsonl"):
        events = [event] if event.get("event") in BEGINNINGS else [*events, event]
    records = [status, *events, *(record for record in read_lines(path / "metrics.jsonl") if record.get("kind") == "train")]
    return max(step for record in records if isinstance(step := record.get("step", 0), int))


def starts_of_job(path: Path) -> list[int]:
    """Returns the steps at which this job's earlier lives began, in their order; [] unless SLURM has started the job again."""
    job = job_facts().get("job")
    if not job or not restart_count():
        return []
    lives = [event for event in read_lines(path / "events.jsonl") if event.get("event") in BEGINNINGS and event.get("job") == job]
    return [step for life in lives if isinstance(step := life.get("step"), int)]


def require_progress(starts: Sequence[int], *, step: int) -> None:
    """Raises: DdpKitError if the last three lives of this job began at `step`, as this one would."""
    if list(starts[-FRUITLESS_LIVES:]) == [step] * FRUITLESS_LIVES:
        raise DdpKitError(
            f"{FRUITLESS_LIVES} lives of this job have begun at step {step} and none has left a later checkpoint, so this one ends here. "
            "events.jsonl and logs/ say how they ended; a smaller --save-every or --save-minutes keeps more. Another job may go on."
        )
