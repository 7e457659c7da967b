"""Where a life of a run begins: its directory, and the checkpoint it goes on from.

Owns: claiming the run directory, what is written there at start, and the choice between a new run,
the next life and a copy of another run. Refuses: going on from a checkpoint of another run by
accident.
"""

import json
import logging
import os
import shlex
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ddp_kit.checkpoint.find import Origin, find, origin_of
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.format.reader import candidates
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.retention import clear
from ddp_kit.data import batch_plan
from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import Topology, environment, facts
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import json_text, read_json
from ddp_kit.io.logs import logger
from ddp_kit.io.process import process_start
from ddp_kit.io.redact import is_secret, redact, redact_text
from ddp_kit.lifecycle.env_facts import describe
from ddp_kit.lifecycle.history import last_step, starts_of_job
from ddp_kit.lifecycle.run_dir import RunDir, default_name, require_shared
from ddp_kit.recipe import Recipe, RecipeSource
from ddp_kit.settings import Settings, to_json
from ddp_kit.setup.build import Composition
from ddp_kit.trackers.base import Tracker
from ddp_kit.trackers.console import Console
from ddp_kit.trackers.jsonl import JsonlTracker
from ddp_kit.training.peak_flops import peak_flops
from ddp_kit.training.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run directory as all ranks know it."""

    name: str
    path: Path
    run_id: str
    earlier: Mapping[str, object]  # the status that an earlier life left
    last_step: int = 0  # that the life before is known to have done
    starts: Sequence[int] = ()  # at which this job's earlier lives began

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def is_finished(self) -> bool:
        """Whether an earlier life came to the end."""
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
) -> Place:
    """Rank 0 chooses and claims the run directory, hands it to `claimed`, and writes the facts of a
    new run; all ranks learn the path.
    """
    path = Path(settings.run_dir) if settings.run_dir else default_path(name)
    place = Place(name=name, path=path, run_id=uuid.uuid4().hex[:16], earlier={})
    if group.rank == 0:
        directory = RunDir(path)
        directory.claim()
        earlier = directory.earlier()
        if earlier and settings.resume == "never":
            directory.release()
            raise ConfigError(
                f"--run-dir {path}: already holds a run (status {earlier.get('status')}, step "
                f"{earlier.get('step')}), and "
                "--resume never forbids to go on with it. Type another --run-dir, or leave --resume "
                "out."
            )
        claimed(directory)
        run_id = str(read_json(path / "settings.json").get("run_id", "")) if earlier else ""
        place = replace(
            place, run_id=run_id or place.run_id, earlier=earlier, starts=starts_of_job(path)
        )
        place = replace(place, last_step=last_step(path, earlier)) if earlier else place
        if not run_id:
            write_facts(directory, settings, group, place=place, source=source)
        if not earlier:
            directory.status("running")
    agreed = json.loads(from_rank(group, json_text(vars(place)).encode()))
    place = Place(**(agreed | {"path": Path(agreed["path"])}))
    require_shared(place.path, place.run_id, group=group)
    return place


def write_facts(
    directory: RunDir,
    settings: Settings,
    group: Group,
    *,
    place: Place,
    source: RecipeSource | None,
) -> None:
    """Writes settings.json and env.json. Those of an earlier life stay until this one has begun."""
    about = {
        "run_id": place.run_id,
        "agent": _agent(),
        "recipe": str(source.path) if source else place.name,
    }
    about |= {"recipe_sha256": source.sha256} if source else {}
    defaults = to_json(source.settings()) if source else {}
    directory.write_json(
        "settings.json",
        about | {"settings": redact(to_json(settings)), "defaults": redact(defaults)},
    )
    folder = source.path.parent if source else None
    directory.write_json("env.json", describe(group.topology, group.device, recipe_folder=folder))


def begins_from(settings: Settings, group: Group, place: Place) -> Opened | None:
    """Returns the checkpoint that this life goes on from, if there is one. Every rank calls it."""
    if group.rank == 0:
        clear(LocalDisk(place.checkpoints))
    if settings.resume not in ("auto", "never"):
        origin = origin_of(Path(settings.resume), flag_text="--resume")
        opened = find(origin, group=group)
        if opened is None:
            raise ConfigError(f"--resume {settings.resume}: there is no good checkpoint in it.")
        is_here = origin.folder.resolve() == place.checkpoints.resolve()
        if not is_here and candidates(LocalDisk(place.checkpoints), group=group):
            raise ConfigError(
                f"--resume {settings.resume}: --run-dir {place.path} has checkpoints of its own. "
                "Type another --run-dir."
            )
        return opened
    opened = (
        find(Origin(place.checkpoints), group=group, sets_aside=True)
        if settings.resume == "auto"
        else None
    )
    if opened is not None and opened.manifest.run_id != place.run_id:
        raise ConfigError(
            f"--run-dir {place.path}: its {opened.folder} belongs to another run "
            f"({opened.manifest.run_id}, not {place.run_id}). "
            f"Type --resume {place.path / 'checkpoints' / opened.folder} to go on from it all the "
            "same."
        )
    if opened is None and place.earlier.get("step"):
        logger.warning("no good checkpoint is in %s: the run begins again at step 0", place.path)
    return opened


def resume_command(args: Sequence[str], path: Path, topology: Topology) -> str:
    """Returns what to type to go on with a run: this life's command with the run directory named,
    and `<token>` for a secret.
    """
    kept = completable(args)
    while any(arg.split("=")[0] == "--run-dir" for arg in kept):
        at = next(i for i, arg in enumerate(kept) if arg.split("=")[0] == "--run-dir")
        del kept[at : at + (1 if "=" in kept[at] else 2)]
    nodes = f" --nnodes={topology.nodes}" if topology.nodes > 1 else ""
    starts = {"none": "python", "slurm": "srun python"}
    start = starts.get(
        topology.launcher, f"torchrun{nodes} --nproc_per_node={topology.local_world_size}"
    )
    return f"{start} -m ddp_kit.train {shlex.join([*kept, '--run-dir', str(path)])}"


def completable(args: Sequence[str]) -> list[str]:
    """Returns the words of a command without secrets: a person types them in place of the flag's
    name in angle brackets.
    """
    shown = []
    blank = ""
    for arg in args:
        name, equals, _ = arg.partition("=")
        if arg.startswith("--"):
            blank = f"<{name.lstrip('-')}>" if is_secret(name) else ""
            shown.append(f"{name}={blank}" if blank and equals else redact_text(arg))
        else:
            shown.append(blank or redact_text(arg))
    return shown


def default_path(name: str) -> Path:
    """Returns the run directory of a run that names none: that of its first life, if torchrun's
    agent has restarted the ranks.
    """
    environ = environment()
    if environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        for path in sorted(Path("runs").glob("*/settings.json"), reverse=True):
            if read_json(path).get("agent") == _agent():
                return path.parent
    return default_name(name)


def _agent() -> str:
    """This process's parent, which under torchrun starts every life of a run."""
    return f"{socket.gethostname()} {os.getppid()} {process_start(os.getppid())}"


def reporter_of(recipe: Recipe, settings: Settings, group: Group) -> Reporter:
    """Returns the reporter of this rank; rank 0's has the trackers."""
    if group.rank:
        return Reporter([], log_every=settings.log_every)
    console, lines = Console(), JsonlTracker()
    trackers: list[Tracker] = [lines, console]
    if "wandb" in settings.tracker:
        from ddp_kit.trackers.wandb import WandbTracker

        trackers.append(WandbTracker(settings.wandb))
    if "tensorboard" in settings.tracker:
        from ddp_kit.trackers.tensorboard import TensorBoardTracker

        trackers.append(TensorBoardTracker())
    given = [*trackers, *recipe.trackers]
    peak = peak_rate(recipe, settings, group)
    return Reporter(
        given,
        log_every=settings.log_every,
        peak_rate=peak,
        progress=[console.progress],
        on_burst=[lines.flush],
    )


def peak_rate(recipe: Recipe, settings: Settings, group: Group) -> float:
    """Returns the samples/s of a recipe if every rank's device, taken to be alike, ran at its peak;
    0 if that is not known.
    """
    if not recipe.flops_per_sample or group.device.type != "cuda":
        return 0.0
    return (
        group.world_size
        * peak_flops(torch.cuda.get_device_name(group.device), precision=settings.precision)
        / recipe.flops_per_sample
    )


def say(composition: Composition, group: Group, path: Path) -> None:
    """The lines at start: where, the split, the defaults for speed, and what wrapping found."""
    training = composition.training
    topology = group.topology
    logger.log(
        logging.DEBUG if topology.launcher == "none" else logging.INFO,
        "ranks by %s: %s",
        topology.launcher,
        facts(topology),
    )
    tuned = [
        *group.tuned,
        *training.tuned,
        *(["channels_last"] if composition.evaluator.placement.channels_last else []),
    ]
    logger.info(
        "run %s on %s x %s, %d steps",
        path,
        group.world_size,
        group.device.type,
        composition.pace.end,
    )
    logger.info("batch: %s", batch_plan.describe(training.plan))
    logger.info("for speed (--no-tuning switches it off): %s", ", ".join(tuned))
    for note in training.notes:
        logger.info("note: %s", note)
