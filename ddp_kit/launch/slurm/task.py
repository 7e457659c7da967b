"""What each task of a batch job runs, started by submitit: a rank, or a node's torchrun or accelerate agent.

Owns: the life of one task inside submitit's job: its signals, its exit code, and the result that submitit's `Job` finds.
Refuses: checkpoints and decisions on requeueing; ranks save, and the batch script requeues.

submitit's handlers ignore SIGTERM and requeue at once on SIGUSR2. Here they are taken out before anything else happens.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from ddp_kit.launch.environment import environment

PORT_S = 120.0  # until the head node has said on which port its store listens
REQUEUE = 75


def rank(run_dir: str, *words: str) -> str:
    """Runs `ddp_kit.train` in this task, which is one rank. Returns: the run's status as JSON text. Raises: SystemExit with its code."""
    signal.signal(signal.SIGCONT, signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _too_early(Path(run_dir)))
    sys.argv = ["ddp_kit.train", *words]
    return _ended(
        lambda: runpy.run_module("ddp_kit.train", run_name="__main__", alter_sys=True),
        run_dir=Path(run_dir),
    )


def _too_early(run_dir: Path) -> Callable[[int, FrameType | None], None]:
    """Returns the handler of signals until ddp_kit's own is there: this life has done nothing yet, and the next one may begin.

    A warning comes to all ranks. SIGTERM may also be srun's, after a rank that has failed: the batch script finds out which one was first.
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
    """Runs a node's agent, whose workers are the ranks: what stands before "--" in `words`, with {nodes}, {head}, {port}, {node} and {job}
    filled in, then the rest as it is. Returns and raises as `rank` does.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(
            number, signal.SIG_IGN
        )  # handed down: an agent dies of them, and its workers install handlers of their own
    told: list[int] = []
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # they go to every process of the step: the agent and its ranks act on them
        signal.signal(
            number, lambda number, frame: told.append(number)
        )  # and this one waits for them
    facts = environment()
    life = f"{facts['SLURM_JOB_ID']}.{facts.get('SLURM_RESTART_COUNT', '0')}"
    hosts = facts["DDP_KIT_HOSTS"].split(",")
    port = _port(
        Path(facts["SUBMITIT_FOLDER"]) / f"{life}.port", is_head=facts["SLURM_NODEID"] == "0"
    )
    facts_of_agent = {
        "{nodes}": str(len(hosts)),
        "{head}": hosts[0],
        "{port}": str(port),
        "{node}": facts["SLURM_NODEID"],
        "{job}": life,
    }
    at = words.index("--")
    command = [*(_filled(word, facts_of_agent) for word in words[:at]), *words[at + 1 :]]
    # the default store is shared by the generations of ranks, and a restarted one finds the dead one's addresses (pytorch #135712)
    environ = {**facts, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    before = _stamp(Path(run_dir))

    def run() -> None:
        code = subprocess.run(command, env=environ, check=False).returncode
        status = (
            _status(Path(run_dir)) if _stamp(Path(run_dir)) != before else {}
        )  # not an earlier life's
        code = code if code >= 0 else 128 - code
        raise SystemExit(
            _code_of_ranks(
                code, run_dir=Path(run_dir), status=status, is_told=signal.SIGTERM in told
            )
        )

    return _ended(run, run_dir=Path(run_dir))


def _code_of_ranks(code: int, *, run_dir: Path, status: Mapping[str, Any], is_told: bool) -> int:
    """Returns what the ranks have ended with, of which agents make 1: what this life's `status` says, if it got so far."""
    if code and (run_dir / "requeue").exists():
        return REQUEUE
    if code and is_told and status.get("status") != "failed":
        return 128 + signal.SIGTERM
    return int(status.get("exit_code") or code) if code == 1 else code


def _stamp(run_dir: Path) -> tuple[int, int]:
    """Another one after each change of status.json, whatever the clocks of its writers say."""
    try:
        facts = (run_dir / "status.json").stat()
    except OSError:
        return 0, 0
    return facts.st_ino, facts.st_mtime_ns


def _filled(word: str, facts: Mapping[str, str]) -> str:
    for name, value in facts.items():
        word = word.replace(name, value)
    return word


def _port(path: Path, *, is_head: bool) -> int:
    """Returns the port of the head node's store: the first free one from the job's own on. The head tells the others by a file."""
    if is_head:
        number = int(environment()["SLURM_JOB_ID"]) * 7 + int(
            environment().get("SLURM_RESTART_COUNT", "0")
        )
        port = next(
            port
            for port in (20000 + (number + step) % 10000 for step in range(10000))
            if _is_free(port)
        )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(str(port))
        temporary.replace(path)
        return port
    end = time.monotonic() + PORT_S
    while not path.exists():
        if time.monotonic() > end:
            raise RuntimeError(
                f"{socket.gethostname()}: the job's first node has not said its port within {PORT_S:g} s ({path})"
            )
        time.sleep(0.1)
    return int(path.read_text())


def _is_free(port: int) -> bool:
    with closing(socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _ended(run: Callable[[], object], *, run_dir: Path) -> str:
    """Runs the work, and leaves for submitit's `Job` what became of it: only text is ever pickled."""
    from submitit import JobEnvironment
    from submitit.core import utils

    result = JobEnvironment().paths.result_pickle
    for stale in (
        result,
        result.with_suffix(result.suffix + ".save_tmp"),
    ):  # of a life whose node died
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
            _mark("ended").touch()  # the batch script does not take srun's 0 for it
        return _text(run_dir / "status.json")
    if code != REQUEUE:
        _failed_first(int(code) if isinstance(code, int) else 1)
        failure = _failure(
            code,
            reason=str(_status(run_dir).get("reason", "")),
            errors=_text(JobEnvironment().paths.stderr),
        )
        with utils.temporary_save_path(result) as path:
            utils.cloudpickle_dump(("error", failure), path)
    raise SystemExit(code)


def _failed_first(code: int) -> None:
    """Leaves the exit code for the batch script, if no other task of this life has failed before."""
    with contextlib.suppress(FileExistsError), _mark("failed").open("x", encoding="utf-8") as file:
        file.write(f"{code}\n")


def _mark(kind: str) -> Path:
    """A file by which this life tells its batch script something."""
    facts = environment()
    job = facts["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in facts:
        job = f"{facts['SLURM_ARRAY_JOB_ID']}_{facts['SLURM_ARRAY_TASK_ID']}"
    return Path(facts["SUBMITIT_FOLDER"]) / f"{job}.{facts.get('SLURM_RESTART_COUNT', '0')}.{kind}"


def _failure(code: object, *, reason: str, errors: str) -> str:
    """Returns what `Job.exception()` tells: the reason that the run's status gives, and what this task has said on stderr."""
    return "\n".join(part for part in (f"exit code {code}", reason, errors.strip()) if part)


def _status(run_dir: Path) -> Mapping[str, Any]:
    text = _text(run_dir / "status.json")
    return json.loads(text) if text else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
