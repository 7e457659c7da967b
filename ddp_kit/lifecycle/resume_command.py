"""What a person types to go on with a run, without the secrets of the command that began it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ddp_kit.distributed.topology import Topology
from ddp_kit.io.redact import is_secret, redact_text


def resume_command(args: Sequence[str], path: Path, topology: Topology) -> str:
    """Returns what to type to go on with a run: this attempt's command with the run directory
    named, and `<token>` for a secret.
    """
    words = shlex.join([*_without_run_dir(completable(args)), "--run-dir", str(path)])
    nodes = f" --nnodes={topology.nodes}" if topology.nodes > 1 else ""
    torchrun = f"torchrun{nodes} --nproc_per_node={topology.local_world_size}"
    starts = {"none": "python", "slurm": "srun python"}
    return f"{starts.get(topology.launcher, torchrun)} -m ddp_kit.train {words}"


def _without_run_dir(args: Sequence[str]) -> list[str]:
    kept = []
    skips_value = False
    for arg in args:
        if skips_value:
            skips_value = False
            continue
        name, equals, _ = arg.partition("=")
        if name == "--run-dir":
            skips_value = not equals
        else:
            kept.append(arg)
    return kept


def completable(args: Sequence[str]) -> list[str]:
    """Returns the words of a command without secrets: a person types them in place of the flag's
    name in angle brackets.
    """
    shown = []
    blank = ""  # what stands for the values of a secret flag
    for arg in args:
        if not arg.startswith("--"):
            shown.append(blank or redact_text(arg))
            continue
        name, equals, _ = arg.partition("=")
        blank = f"<{name.lstrip('-')}>" if is_secret(name) else ""
        if blank and equals:
            shown.append(f"{name}={blank}")
        else:
            shown.append(redact_text(arg))
    return shown
