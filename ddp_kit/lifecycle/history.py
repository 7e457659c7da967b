"""What earlier lives of a run left: how far they came, and whether this job goes round in circles.

Owns: reading that from status.json, metrics.jsonl and events.jsonl. Rank 0 reads, the others are
told. Refuses: a job that SLURM starts again and again without a new step. A start by hand is never
refused: it is another job.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import DdpKitError
from ddp_kit.io.json_lines import read_lines

FRUITLESS_LIVES = 3
BEGINNINGS = ("start", "resume")


def job_facts() -> dict[str, object]:
    """Returns what the event at a life's beginning says of its SLURM job: {} outside one."""
    job = environment().get("SLURM_JOB_ID", "")
    if not job:
        return {}
    return {
        "job": job,
        "restart": restart_count(),
        "cluster": environment().get("SLURM_CLUSTER_NAME", ""),
    }


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
    text = environment().get("SLURM_RESTART_COUNT", "")
    return int(text) if text.isdigit() else 0


def last_step(path: Path, status: Mapping[str, object]) -> int:
    """Returns the last step that the life before is known to have done."""
    events: list[dict[str, object]] = []
    for event in read_lines(path / "events.jsonl"):
        events = [event] if event.get("event") in BEGINNINGS else [*events, event]
    records = [
        status,
        *events,
        *(record for record in read_lines(path / "metrics.jsonl") if record.get("kind") == "train"),
    ]
    return max(step for record in records if isinstance(step := record.get("step", 0), int))


def starts_of_job(path: Path) -> list[int]:
    """Returns the steps at which this job's earlier lives began, in their order; [] unless SLURM
    has started the job again.

    Another job of that number is none of it: one of another cluster, or one from before the
    cluster's count began anew.
    """
    own = job_facts()
    if not own or not restart_count():
        return []
    lives: list[dict[str, object]] = []
    for event in read_lines(path / "events.jsonl"):
        is_beginning = event.get("event") in BEGINNINGS and event.get("job") == own["job"]
        if not is_beginning or event.get("cluster", own["cluster"]) != own["cluster"]:
            continue
        if lives and _restart_of(event) < _restart_of(lives[-1]):
            lives = []
        lives.append(event)
    if lives and _restart_of(lives[-1]) > restart_count():
        return []
    return [step for life in lives if isinstance(step := life.get("step"), int)]


def _restart_of(life: Mapping[str, object]) -> int:
    found = life.get("restart")
    return found if isinstance(found, int) else 0


def require_progress(starts: Sequence[int], *, step: int) -> None:
    """Raises: DdpKitError if the last three lives of this job began at `step`, as this one would."""
    if list(starts[-FRUITLESS_LIVES:]) == [step] * FRUITLESS_LIVES:
        raise DdpKitError(
            f"{FRUITLESS_LIVES} lives of this job have begun at step {step} and none has left a "
            "later checkpoint, so this one ends here. "
            "events.jsonl and logs/ say how they ended; a smaller --save-every or --save-minutes "
            "keeps more. Another job may go on."
        )
