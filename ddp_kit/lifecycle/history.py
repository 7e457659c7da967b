"""What earlier attempts of a run left: how far they came, and whether this job goes in circles.

It is read from status.json, metrics.jsonl and events.jsonl, by rank 0; the others are told. A job
that SLURM starts again and again without a new step would use up its hours for nothing, so it ends.
A start by hand is never refused: it is another job.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ddp_kit.distributed.topology import environment
from ddp_kit.errors import DdpKitError
from ddp_kit.io.json_lines import read_lines

MOST_FRUITLESS = 3
BEGINNINGS = ("start", "resume")


def job_facts() -> dict[str, object]:
    """Returns what the event at an attempt's beginning says of its SLURM job: {} outside one."""
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


def starts_of_job(path: Path) -> list[int]:
    """Returns the steps at which this job's earlier attempts began, in their order; [] unless SLURM
    has started the job again.

    Another job of that number is none of it: one of another cluster, or one from before the
    cluster's count began anew.
    """
    own = job_facts()
    if not own or not restart_count():
        return []
    beginnings: list[dict[str, object]] = []
    for event in read_lines(path / "events.jsonl"):
        is_beginning = event.get("event") in BEGINNINGS and event.get("job") == own["job"]
        if not is_beginning or event.get("cluster", own["cluster"]) != own["cluster"]:
            continue
        if beginnings and _restart_of(event) < _restart_of(beginnings[-1]):
            beginnings = []
        beginnings.append(event)
    if beginnings and _restart_of(beginnings[-1]) > restart_count():
        return []
    starts = []
    for event in beginnings:
        step = event.get("step")
        if isinstance(step, int):
            starts.append(step)
    return starts


def _restart_of(beginning: Mapping[str, object]) -> int:
    found = beginning.get("restart")
    return found if isinstance(found, int) else 0


def require_progress(starts: Sequence[int], *, step: int) -> None:
    """Raises: DdpKitError if the last three attempts of this job began at `step`, as this one
    would.
    """
    if list(starts[-MOST_FRUITLESS:]) == [step] * MOST_FRUITLESS:
        raise DdpKitError(
            f"{MOST_FRUITLESS} lives of this job have begun at step {step} and none has left a "
            "later checkpoint, so this one ends here. "
            "events.jsonl and logs/ say how they ended; a smaller --save-every or --save-minutes "
            "keeps more. Another job may go on."
        )
