"""What each task of a batch job runs, started by submitit: a rank, or a node's agent.

It keeps one task inside submitit's job: its signals, its exit code, and the result that
submitit's `Job` finds. Ranks save, and the batch script requeues.

submitit's handlers ignore SIGTERM and requeue at once on SIGUSR2. Here they are taken out before
anything else happens.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ddp_kit.launch.environment import environment
from ddp_kit.launch.slurm.head_port import head_port

REQUEUE = 75


def rank(run_dir: str, *words: str) -> str:
    """Runs `ddp_kit.train` in this task, which is one rank.

    Returns: the run's status as JSON text. Raises: SystemExit with its code.
    """
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _too_early(Path(run_dir)))
    sys.argv = ["ddp_kit.train", *words]
    return _ended(
        lambda: runpy.run_module("ddp_kit.train", run_name="__main__", alter_sys=True),
        run_dir=Path(run_dir),
    )


def _too_early(run_dir: Path) -> Callable[[int, FrameType | None], None]:
    """Returns the handler of signals until ddp_kit's own is there: nothing was done so far.

    A warning comes to all ranks, and the job may be requeued. SIGTERM may also be srun's, after a
    rank that has failed: the batch script finds out which one was first.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM or not environment().get("DDP_KIT_REQUEUE"):
            _failed_first(128 + number)
            os._exit(128 + number)
        if environment()["SLURM_PROCID"] == "0":
            (run_dir / "requeue").write_text(
                f"{signal.Signals(number).name} before training began\n"
            )
        os._exit(REQUEUE)

    return leave


def agent(run_dir: str, *words: str) -> str:
    """Runs a node's agent, which starts the ranks there.

    The command is what stands before "--" in `words`, with {nodes}, {head}, {port}, {node} and
    {job} filled in, then the rest as it is. Returns and raises as `rank` does.
    """
    # Handed down: an agent dies of them, and its ranks install handlers of their own.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # They go to every process of the step: the agent and its ranks act on them, and this process
    # waits for those.
    told: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: told.append(number))
    command = _agents_command(words)
    # The default store is shared by the generations of ranks, and a restarted one finds the dead
    # one's addresses (pytorch #135712).
    environ = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    home = Path(run_dir)
    before = _stamp(home)

    def run() -> None:
        code = subprocess.run(command, env=environ, check=False).returncode
        if code < 0:
            code = 128 - code
        status: Mapping[str, Any] = {}
        # else it is an earlier life's
        if _stamp(home) != before:
            status = _status(home)
        is_told = signal.SIGTERM in told
        raise SystemExit(_code_of_ranks(code, run_dir=home, status=status, is_told=is_told))

    return _ended(run, run_dir=home)


def _agents_command(words: Sequence[str]) -> list[str]:
    facts = environment()
    hosts = facts["DDP_KIT_HOSTS"].split(",")
    port = head_port(job_file("port"), is_head=facts["SLURM_NODEID"] == "0")
    values = {
        "{nodes}": str(len(hosts)),
        "{head}": hosts[0],
        "{port}": str(port),
        "{node}": facts["SLURM_NODEID"],
        "{job}": f"{facts['SLURM_JOB_ID']}.{_requeues()}",
    }
    at = words.index("--")
    return [*(_filled(word, values) for word in words[:at]), *words[at + 1 :]]


def _filled(word: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def _code_of_ranks(code: int, *, run_dir: Path, status: Mapping[str, Any], is_told: bool) -> int:
    """Returns what the ranks have ended with, of which agents make 1.

    `status` is what the run says since this task has begun, if it got so far.
    """
    if code and (run_dir / "requeue").exists():
        return REQUEUE
    if code and is_told and status.get("status") != "failed":
        return 128 + signal.SIGTERM
    if code == 1:
        return int(status.get("exit_code") or code)
    return code


def _stamp(run_dir: Path) -> tuple[int, int]:
    """Another one after each change of status.json, whatever the clocks of its writers say."""
    try:
        facts = (run_dir / "status.json").stat()
    except OSError:
        return 0, 0
    return facts.st_ino, facts.st_mtime_ns


def _ended(run: Callable[[], object], *, run_dir: Path) -> str:
    """Runs the work, and leaves for submitit's `Job` what became of it: only text is pickled."""
    from submitit import JobEnvironment
    from submitit.core import utils

    paths = JobEnvironment().paths
    result = paths.result_pickle
    # of a life whose node died
    for stale in (result, result.with_suffix(result.suffix + ".save_tmp")):
        stale.unlink(missing_ok=True)
    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        if environment()["SLURM_PROCID"] == "0":
            # the batch script does not take srun's 0 for it
            _mark("ended").touch()
        return _text(run_dir / "status.json")
    if code != REQUEUE:
        _failed_first(code if isinstance(code, int) else 1)
        reason = str(_status(run_dir).get("reason", ""))
        failure = _failure(code, reason=reason, errors=_text(paths.stderr))
        with utils.temporary_save_path(result) as path:
            utils.cloudpickle_dump(("error", failure), path)
    raise SystemExit(code)


def _failed_first(code: int) -> None:
    """Leaves the exit code for the batch script, if no other task has failed before."""
    with contextlib.suppress(FileExistsError), _mark("failed").open("x", encoding="utf-8") as file:
        file.write(f"{code}\n")


def _failure(code: object, *, reason: str, errors: str) -> str:
    """Returns what `Job.exception()` tells.

    It is the reason that the run's status gives, and what this task has said on stderr.
    """
    return "\n".join(part for part in (f"exit code {code}", reason, errors.strip()) if part)


def job_file(kind: str) -> Path:
    """A file by which the tasks of a job tell each other something, until it is requeued."""
    facts = environment()
    return Path(facts["SUBMITIT_FOLDER"]) / f"{facts['SLURM_JOB_ID']}.{_requeues()}.{kind}"


def _mark(kind: str) -> Path:
    """A file by which the tasks of a job, or of an array's element, tell its batch script."""
    facts = environment()
    job = facts["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in facts:
        job = f"{facts['SLURM_ARRAY_JOB_ID']}_{facts['SLURM_ARRAY_TASK_ID']}"
    return Path(facts["SUBMITIT_FOLDER"]) / f"{job}.{_requeues()}.{kind}"


def _requeues() -> str:
    """How often the job was requeued."""
    return environment().get("SLURM_RESTART_COUNT", "0")


def _status(run_dir: Path) -> Mapping[str, Any]:
    text = _text(run_dir / "status.json")
    if not text:
        return {}
    found: Mapping[str, Any] = json.loads(text)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
