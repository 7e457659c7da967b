"""Where an attempt of a run begins: its directory, and the checkpoint it goes on from.

A new run, the next attempt of one, and a copy of another run are told apart here: nothing goes on
from a checkpoint of another run by accident.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ddp_kit.checkpoint.find import Origin, find, origin_of
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.reader import candidates
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import clear
from ddp_kit.distributed.collectives import from_rank, max_over_ranks
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import environment
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import json_text, read_json
from ddp_kit.io.logs import logger
from ddp_kit.io.polling import wait_until
from ddp_kit.io.redact import redact
from ddp_kit.lifecycle.env_facts import environment_facts
from ddp_kit.lifecycle.history import (
    CLAIM,
    agent,
    fruitless,
    job_facts,
    last_step,
    lives_of_job,
    note,
)
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.recipe import RecipeSource
from ddp_kit.settings import Settings, to_json

SEEN_S = 10.0  # until another host sees a new file
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class RunPlace:
    """The run directory as all ranks know it."""

    name: str
    path: Path
    run_id: str
    earlier: Mapping[str, object]  # the status that an earlier attempt left
    last_step: int = 0  # that the attempt before is known to have done
    # At which this job's last fruitless attempts began (None: never), and what they ended by.
    starts: Sequence[int | None] = ()
    endings: Sequence[str] = ()
    job: Mapping[str, object] = field(default_factory=dict)  # that this attempt is a life of
    origin: str = ""  # what --resume named when the run began from it
    is_restarted: bool = False  # by SLURM or torchrun's agent, with the command as it was

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether an earlier attempt came to the end."""
        return self.earlier.get("status") == "finished"

    @property
    def is_stopped_early(self) -> bool:
        """Whether it was early stopping that ended it."""
        return str(self.earlier.get("reason", "")).startswith("stopped early")


def open_directory(
    settings: Settings,
    group: Group,
    *,
    name: str,
    source: RecipeSource | None,
    claimed: Callable[[RunDir], None],
) -> RunPlace:
    """Rank 0 chooses and claims the run directory, hands it to `claimed`, and writes the facts of a
    new run; all ranks learn the path. Every rank calls it.

    Raises: ConfigError if the directory is in use, cannot be written, holds a run that is not to go
        on, or is not seen by all ranks.
    """
    path = Path(settings.run_dir) if settings.run_dir else default_path(name)
    place = RunPlace(name=name, path=path, run_id=uuid.uuid4().hex[:16], earlier={})
    if group.rank == 0:
        place = _claim(place, settings, group, source=source, claimed=claimed)
    agreed = json.loads(from_rank(group, json_text(vars(place)).encode()))
    agreed["path"] = Path(agreed["path"])
    place = RunPlace(**agreed)
    _require_shared(place.path, place.run_id, group=group)
    return place


def _claim(
    place: RunPlace,
    settings: Settings,
    group: Group,
    *,
    source: RecipeSource | None,
    claimed: Callable[[RunDir], None],
) -> RunPlace:
    """Claims the run directory and reads what an earlier attempt left there. Rank 0 calls it."""
    path = place.path
    directory = RunDir(path)
    job = job_facts(path)
    directory.claim()
    earlier = directory.earlier()
    if earlier and settings.resume == "never":
        directory.release()
        raise ConfigError(
            f"--run-dir {path}: already holds a run (status {earlier.get('status')}, "
            f"step {earlier.get('step')}), and --resume never forbids to go on with it. "
            "Type another --run-dir, or leave --resume out."
        )
    claimed(directory)
    facts: Mapping[str, object] = {}
    if earlier:
        facts = read_json(path / "settings.json")
    run_id = str(facts.get("run_id", ""))
    lives = lives_of_job(path, job)
    if job:
        note(path, CLAIM, job)
    place = replace(
        place,
        run_id=run_id or place.run_id,
        earlier=earlier,
        starts=[life.step for life in fruitless(lives)],
        endings=[life.ending for life in fruitless(lives)],
        job=job,
        origin=str(facts.get("resumed_from", "")),
        is_restarted=bool(lives) or _restarts_by_agent() > 0,
    )
    if earlier:
        place = replace(place, last_step=last_step(path, earlier))
    if not run_id:
        write_facts(directory, settings, group, place=place, source=source)
    if not earlier:
        directory.status("running")
    return place


def _require_shared(path: Path, run_id: str, *, group: Group) -> None:
    """Raises: ConfigError on every rank if one of them does not see the settings.json that rank 0
    has written.
    """
    own = group.rank + 1
    if wait_until(lambda: _is_seen(path, run_id), within_s=SEEN_S, pause_s=POLL_S):
        own = 0
    missing = max_over_ranks(group, [own])[0]
    if missing:
        raise ConfigError(
            f"rank {missing - 1} does not see --run-dir {path} as rank 0 wrote it. All nodes must "
            "share that file system.",
            rank=missing - 1,
        )


def _is_seen(path: Path, run_id: str) -> bool:
    return read_json(path / "settings.json").get("run_id") == run_id


def write_facts(
    directory: RunDir,
    settings: Settings,
    group: Group,
    *,
    place: RunPlace,
    source: RecipeSource | None,
) -> None:
    """Writes settings.json and env.json. Those of an earlier attempt stay until this one has
    begun.
    """
    about: dict[str, object] = {"run_id": place.run_id, "agent": agent(), "recipe": place.name}
    about["resumed_from"] = place.origin
    if settings.resume not in ("auto", "never"):
        about["resumed_from"] = _whole_path(settings.resume)
    defaults: Mapping[str, object] = {}
    folder = None
    if source is not None:
        about["recipe"] = str(source.path)
        about["recipe_sha256"] = source.sha256
        defaults = to_json(source.settings())
        folder = source.path.parent
    about["settings"] = redact(to_json(settings))
    about["defaults"] = redact(defaults)
    directory.write_json("settings.json", about)
    directory.write_json(
        "env.json", environment_facts(group.topology, group.device, recipe_folder=folder)
    )


def begins_from(settings: Settings, group: Group, place: RunPlace) -> Opened | None:
    """Returns the checkpoint that this attempt goes on from, if there is one. Every rank calls it.

    Raises: ConfigError if there is none where one was asked for, or it is another run's.
    """
    if group.rank == 0:
        clear(LocalDisk(place.checkpoints))
    if settings.resume not in ("auto", "never"):
        return _named(settings.resume, group, place)
    opened = None
    if settings.resume == "auto":
        opened = find(Origin(place.checkpoints), group=group, sets_aside=True)
    if opened is not None and opened.manifest.run_id != place.run_id:
        raise ConfigError(
            f"--run-dir {place.path}: its {opened.folder} belongs to another run "
            f"({opened.manifest.run_id}, not {place.run_id}). Type --resume "
            f"{place.path / 'checkpoints' / opened.folder} to go on from it all the same."
        )
    if opened is None and place.earlier.get("step"):
        logger.warning("no good checkpoint is in %s: the run begins again at step 0", place.path)
    return opened


def _named(resume: str, group: Group, place: RunPlace) -> Opened:
    """Returns the checkpoint that --resume names, or the newest one of this run if it has begun
    from there before: a job that is started again has its command as it was. Raises: ConfigError.
    """
    is_here = _is_in(Path(resume), place.checkpoints)
    has_own = bool(candidates(LocalDisk(place.checkpoints), group=group))
    is_same = place.origin == _whole_path(resume)
    # Whoever goes back in a run of their own may want to do so once more.
    if is_same and has_own and (place.is_restarted or not is_here):
        opened = find(Origin(place.checkpoints), group=group, sets_aside=True)
        if opened is not None:
            return opened
    opened = find(origin_of(Path(resume), flag_text="--resume"), group=group)
    if opened is None:
        raise ConfigError(f"--resume {resume}: there is no good checkpoint in it.")
    if not is_here and has_own and not is_same:
        raise ConfigError(
            f"--resume {resume}: --run-dir {place.path} has checkpoints of its own. "
            "Type another --run-dir."
        )
    return opened


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a path of a run, of its checkpoints or of one of them has them in a folder."""
    whole = path.resolve()
    return folder.resolve() in (whole, whole.parent, whole / "checkpoints")


def _whole_path(path: str) -> str:
    return str(Path(path).resolve())


def _restarts_by_agent() -> int:
    """Returns how often torchrun's agent has started the ranks again."""
    return int(environment().get("TORCHELASTIC_RESTART_COUNT", "0"))


def default_path(name: str) -> Path:
    """Returns the run directory of a run that names none: that of its first attempt, if torchrun's
    agent has restarted the ranks.
    """
    if _restarts_by_agent():
        for path in sorted(Path("runs").glob("*/settings.json"), reverse=True):
            if read_json(path).get("agent") == agent():
                return path.parent
    return default_name(name)


def default_name(recipe: str, environ: Mapping[str, str] | None = None) -> Path:
    """Returns `runs/<recipe>-<UTC time>`, under SLURM `runs/<recipe>-<job id>[_<array task>]`.

    A time that is taken gets a suffix. A job's name does not: its later attempts must come to the
    same directory.
    """
    environ = environment() if environ is None else environ
    name = re.sub(r"[^\w.-]+", "-", recipe)
    if "SLURM_JOB_ID" in environ:
        job = environ.get("SLURM_ARRAY_JOB_ID", environ["SLURM_JOB_ID"])
        task = environ.get("SLURM_ARRAY_TASK_ID", "")
        return Path("runs") / (f"{name}-{job}_{task}" if task else f"{name}-{job}")
    first = Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    path = first
    suffix = 1
    while path.exists():
        suffix += 1
        path = first.with_name(f"{first.name}-{suffix}")
    return path
