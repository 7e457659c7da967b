"""The batch script of a plan, as text: every line that SLURM and bash read.

It is a pure function, so that `--dry-run` shows the very bytes that are submitted.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ddp_kit.launch.slurm.plan import SlurmPlan
from ddp_kit.launch.slurm.script_text import BEGAN, END, FILES, SAY, STEP, TASK, TOLD, WAIT
from ddp_kit.launch.slurm.values import options

NODE_CHECK_S = 60
# what sbatch's reader of #SBATCH lines takes unquoted, beside letters and digits
PLAIN = "-_./:,=%@+"
# the variables of sbatch's options that are not named like them
OTHER_NAMES = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}


def render(plan: SlurmPlan) -> str:
    """Returns the batch script.

    It is what this shell does itself, and between STEP and WAIT what another one does, which
    runs the user's lines.
    """
    own = [_head(plan), "\n", SAY, TOLD, _which_run(plan), FILES, "\n"]
    step = [STEP, SAY, _variables(plan), _setup(plan), BEGAN, _step(plan), "DDP_KIT_STEP\n"]
    return "".join([*own, *step, WAIT, "\n", END])


def directives(plan: SlurmPlan) -> Mapping[str, str | None]:
    """Returns sbatch's options by name; None for one without a value.

    The user's own `--sbatch` come last, and win.
    """
    log = f"{plan.folder}/%j.log"
    if plan.is_array:
        log = f"{plan.folder}/%A_%a.log"
    cpus_per_task = plan.cpus_per_task
    if plan.has_agents:
        cpus_per_task *= plan.processes
    asked = {
        "job-name": plan.name,
        "comment": f"ddp_kit:{Path(plan.folder).parent}",
        "chdir": plan.chdir,
        "output": log,
        "open-mode": "append",
        # not the least of them too: SLURM would hand out no more
        "nodes": str(plan.nodes),
        "ntasks-per-node": str(plan.tasks_per_node),
        "cpus-per-task": str(cpus_per_task or ""),
        "gpus-per-node": str(plan.gpus_per_node or ""),
        "mem": plan.memory,
        "time": plan.time,
        "array": _elements(plan),
        "partition": plan.partition,
        "qos": plan.qos,
        "account": plan.account,
        "constraint": plan.constraint,
        "exclude": plan.exclude,
        "nodelist": plan.nodelist,
        "dependency": plan.dependency,
        "signal": f"USR1@{plan.warn_s}",
    }
    flags: dict[str, str | None] = {name: value for name, value in asked.items() if value}
    flags["requeue" if plan.max_requeues else "no-requeue"] = None
    if plan.min_nodes:
        flags["no-kill"] = None
    if plan.dependency:
        flags["kill-on-invalid-dep"] = "yes"
    return {**flags, **options(plan.sbatch)}


def _elements(plan: SlurmPlan) -> str:
    """The elements of an array as sbatch writes them, "" for a job of its own."""
    if not plan.is_array:
        return ""
    elements = f"0-{len(plan.runs) - 1}"
    if plan.parallel:
        elements += f"%{plan.parallel}"
    return elements


def variables(plan: SlurmPlan) -> set[str]:
    """Returns sbatch's variables that would win over the script, for instance SBATCH_PARTITION."""
    names = {*directives(plan), "requeue", "no-requeue"}
    return {f"SBATCH_{OTHER_NAMES.get(name, name.upper().replace('-', '_'))}" for name in names}


def _head(plan: SlurmPlan) -> str:
    lines = [
        f"#SBATCH {_flag(name, value, quote=_sbatch_quoted)}"
        for name, value in directives(plan).items()
    ]
    return _text(["#!/bin/bash", *lines])


def _flag(name: str, value: str | None, *, quote: Callable[[str], str]) -> str:
    if value is None:
        return f"--{name}"
    return f"--{name}={quote(value)}"


def _sbatch_quoted(value: str) -> str:
    """Quotes for sbatch's own reader of #SBATCH lines.

    It knows backslashes, and takes an unquoted # for a comment.
    """
    if all(character.isalnum() or character in PLAIN for character in value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _which_run(plan: SlurmPlan) -> str:
    """Which run this job is, and whether it may be requeued once more."""
    where = [f"ddp_kit_run={shlex.quote(plan.runs[0].folder)}"]
    if plan.is_array:
        cases = [
            f"  {number}) ddp_kit_run={shlex.quote(run.folder)} ;;"
            for number, run in enumerate(plan.runs)
        ]
        where = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    return _text(
        [
            *where,
            f"ddp_kit_folder={shlex.quote(plan.folder)}",
            f"ddp_kit_max_requeues={plan.max_requeues}",
            'ddp_kit_go_on="ddp-kit resubmit $(printf %q "$ddp_kit_run")"',
            'ddp_kit_say "life $ddp_kit_life of job $ddp_kit_job on $SLURM_JOB_NODELIST: '
            '$ddp_kit_run"',
            'if [ "$ddp_kit_life" -gt "$ddp_kit_max_requeues" ]; then',
            '  ddp_kit_say "the limit of $ddp_kit_max_requeues requeues is passed. '
            'To go on: $ddp_kit_go_on"',
            "  exit 1",
            "fi",
        ]
    )


def _variables(plan: SlurmPlan) -> str:
    """What the ranks, and the user's own lines of setup, find in their environment."""
    own = {"DDP_KIT_LAUNCHER": f"ddp-kit slurm, {plan.launcher}"}
    if plan.max_requeues:
        own["DDP_KIT_REQUEUE"] = "1"
    own["DDP_KIT_GRACE_S"] = str(plan.warn_s)
    own["DDP_KIT_PREFLIGHT_S"] = str(NODE_CHECK_S)
    if plan.code:
        # else a program's own folder would come before the copied code
        own["PYTHONSAFEPATH"] = "1"
    # --env A= makes it empty
    stated = {**own, **plan.environment}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in stated.items()]
    lines.append(
        'export DDP_KIT_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"'
    )
    if plan.code:
        folders = shlex.quote(":".join(plan.code))
        lines.append(f"export PYTHONPATH={folders}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines.append("export SUBMITIT_EXECUTOR=slurm")
    # srun does not take it from sbatch
    lines.append(
        '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'
    )
    return _text(lines)


def _setup(plan: SlurmPlan) -> str:
    """The user's own lines, each as it was typed."""
    lines = []
    for line in plan.setup:
        failed = shlex.quote(f"--setup {line}: it failed")
        lines.append(line)
        lines.append(f"if [ $? -ne 0 ]; then ddp_kit_say {failed}; exit 1; fi")
    return _text(lines)


def _step(plan: SlurmPlan) -> str:
    """The step that starts the ranks."""
    lines = []
    python = shlex.quote(plan.python)
    if not plan.container_image:
        missing = (
            f'ddp_kit_say {python}" is not there on $(hostname): '
            'type --python, or --setup with what makes it appear"'
        )
        lines.append(f"command -v {python} >/dev/null || {{ {missing}; exit 127; }}")
    folder = shlex.quote(plan.folder)
    tasks = '"$SLURM_NNODES"' if plan.has_agents else '"$SLURM_NTASKS"'
    start = f"srun -n {tasks} --ntasks-per-node={plan.tasks_per_node}"
    program = f"bash -c {shlex.quote(TASK)} sh {python} -u -m submitit.core._submit {folder}"
    lines.append(" \\\n  ".join([start, *_step_flags(plan), program]))
    return _text(lines)


def _step_flags(plan: SlurmPlan) -> list[str]:
    """srun's flags; the user's own `--srun` come last."""
    pattern = f"{shlex.quote(plan.folder)}/%j_%t_log"
    if plan.is_array:
        pattern = f"{shlex.quote(plan.folder)}/%A_%a_%t_log"
    flags = ["--kill-on-bad-exit=1"]
    if plan.min_nodes:
        # the agents that are left re-form; with an input from srun they would be killed when
        # srun's node dies
        flags = ["--no-kill", "--kill-on-bad-exit=0", "--input=none"]
    flags += [
        "--unbuffered",
        "--open-mode=append",
        f"--output={pattern}.out",
        f"--error={pattern}.err",
    ]
    passed: dict[str, str | None] = {}
    if plan.container_image:
        passed["container-image"] = plan.container_image
    if plan.container_mounts:
        passed["container-mounts"] = plan.container_mounts
    passed |= options(plan.srun)
    flags += [_flag(name, value, quote=shlex.quote) for name, value in passed.items()]
    return flags


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
