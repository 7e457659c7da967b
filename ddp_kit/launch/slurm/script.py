"""The batch script of a plan, as text: a pure function, so that `--dry-run` shows the very bytes that are submitted.

Owns: every line that SLURM and bash read. Refuses: writing or submitting it.

The script's shell outlives its step: the ranks save on a signal, and only then the job is requeued. Its exit code is the job's truth.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from ddp_kit.launch.slurm.plan import SlurmPlan, options

PREFLIGHT_S = 60
SAY = """\
ddp_kit_say() { printf '%(%Y-%m-%dT%H:%M:%S%z)T ddp-kit: %s\\n' -1 "$*"; }
"""
TOLD = """\
set +eu  # a BASH_ENV or exported SHELLOPTS may have set them
ddp_kit_told=""
trap 'ddp_kit_told=yes' TERM                      # scancel and scontrol requeue tell this shell too; a preemption tells the ranks alone
ddp_kit_life=${SLURM_RESTART_COUNT:-0}
ddp_kit_job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
ddp_kit_job=${ddp_kit_job:-$SLURM_JOB_ID}
"""
FILES = """\
ddp_kit_mark=$ddp_kit_folder/$ddp_kit_job.$ddp_kit_life
ddp_kit_began=$ddp_kit_mark.began                 # the lines of --setup have come to their end
ddp_kit_failed=$ddp_kit_mark.failed               # the exit code of the first task that failed
ddp_kit_ended=$ddp_kit_mark.ended                 # task 0 has ended well
rm -f "$ddp_kit_run/requeue" "$ddp_kit_began" "$ddp_kit_failed" "$ddp_kit_ended"
rm -f "$ddp_kit_folder/$SLURM_JOB_ID.$ddp_kit_life".{port,over}
"""
STEP = """\
# The step, in a shell of its own: whatever --setup does there to traps, options, names or the exit code, this script goes on as it is.
# In the background: a shell that waits for a program in front of it hears no signal.
/bin/bash /dev/fd/9 "$ddp_kit_began" 9<<'DDP_KIT_STEP' &
exec 9<&-
ddp_kit_began=$1
"""
BEGAN = """\
set +eufC                                         # --setup may have set them
trap : TERM                                       # srun hears it too and ends the ranks; its exit code is waited for
: > "$ddp_kit_began"
"""
TASK = """\
trap "" USR1 USR2  # the warning may come before the program can hear it, and an agent of torchrun would die of it
if ! command -v "$1" >/dev/null; then
  echo "ddp-kit: $1 is not there on $(hostname): type --python, or --setup with what makes it appear" >&2
  exit 127
fi
exec "$@"\
"""  # on each node
WAIT = """\
ddp_kit_step=$!
ddp_kit_rc=""
while kill -0 "$ddp_kit_step" 2>/dev/null; do     # a signal to this shell ends a wait, not the step
  wait "$ddp_kit_step"
  ddp_kit_rc=$?
done
wait "$ddp_kit_step"
ddp_kit_last=$?
if [ -z "$ddp_kit_rc" ] || [ "$ddp_kit_last" -ne 127 ]; then  # 127: the loop has had its code already
  ddp_kit_rc=$ddp_kit_last
fi
ddp_kit_first=""
if [ -e "$ddp_kit_failed" ]; then read -r ddp_kit_first < "$ddp_kit_failed"; fi
case "$ddp_kit_first:$ddp_kit_rc" in              # srun ends the tasks after the one that failed, and tells the largest code
  :* | *:137 | 143:13[0-9]) ;;                    # a task that was killed, or has crashed, could not say so: srun does
  *) ddp_kit_rc=$ddp_kit_first ;;
esac
"""
END = """\
ddp_kit_again=""
ddp_kit_stopped="life $ddp_kit_life of job $ddp_kit_job has stopped with nothing lost"
if [ ! -e "$ddp_kit_began" ] && [ -z "$ddp_kit_told" ]; then
  ddp_kit_say "--setup has ended the script before the ranks were started (its exit code: $ddp_kit_rc)"
  ddp_kit_rc=1
elif [ -e "$ddp_kit_run/requeue" ]; then          # rank 0 leaves it when a stopped run is saved
  ddp_kit_again=yes
elif [ "$ddp_kit_rc" -eq 143 ] && [ "$ddp_kit_max_requeues" -gt 0 ]; then
  ddp_kit_again=yes                               # preempted before the first step: no task has failed before its SIGTERM
elif [ "$ddp_kit_rc" -eq 0 ] && [ ! -e "$ddp_kit_ended" ]; then  # srun does not count tasks that it could not start
  ddp_kit_say "srun has ended with 0, but no rank 0 has come to its end: were the tasks started? Every node must see $ddp_kit_folder"
  ddp_kit_rc=1
fi
if [ -n "$ddp_kit_again" ]; then
  ddp_kit_rc=75
  if [ -n "$ddp_kit_told" ]; then
    ddp_kit_say "$ddp_kit_stopped; SLURM itself ends or requeues the job"
  elif [ "$ddp_kit_life" -ge "$ddp_kit_max_requeues" ]; then
    ddp_kit_say "$ddp_kit_stopped: --max-requeues $ddp_kit_max_requeues is reached. To go on: $ddp_kit_go_on"
  elif scontrol requeue "$ddp_kit_job" || [ -n "$ddp_kit_told" ]; then  # SLURM tells scontrol too, at once
    ddp_kit_say "$ddp_kit_stopped: requeued"
  else
    ddp_kit_say "$ddp_kit_stopped: it could not be requeued. To go on: $ddp_kit_go_on"
  fi
fi
ddp_kit_say "life $ddp_kit_life of job $ddp_kit_job ends with exit code $ddp_kit_rc"
exit "$ddp_kit_rc"
"""


def render(plan: SlurmPlan) -> str:
    """Returns the batch script: what is this shell's own, and between STEP and WAIT what another one does, which runs the user's lines."""
    own = [_head(plan), "\n", SAY, TOLD, _places(plan), FILES, "\n"]
    step = [STEP, SAY, _surroundings(plan), _setup(plan), BEGAN, _step(plan), "DDP_KIT_STEP\n"]
    return "".join([*own, *step, WAIT, "\n", END])


def directives(plan: SlurmPlan) -> Mapping[str, str | None]:
    """Returns sbatch's options by name; None for one without a value. The user's own `--sbatch` come last."""
    log = f"{plan.folder}/%A_%a.log" if plan.is_array else f"{plan.folder}/%j.log"
    one_task = plan.launcher != "srun"
    every = f"%{plan.parallel}" if plan.parallel else ""
    asked = {
        "job-name": plan.name,
        "comment": f"ddp_kit:{Path(plan.folder).parent}",
        "chdir": plan.chdir,
        "output": log,
        "open-mode": "append",
        "nodes": str(plan.nodes),  # not the least of them too: SLURM would hand out no more
        "ntasks-per-node": "1" if one_task else str(plan.processes),
        "cpus-per-task": str(plan.cpus_per_task * (plan.processes if one_task else 1))
        if plan.cpus_per_task
        else "",
        "gpus-per-node": str(plan.gpus_per_node) if plan.gpus_per_node else "",
        "mem": plan.memory,
        "time": plan.time,
        "array": f"0-{len(plan.runs) - 1}{every}" if plan.is_array else "",
        **{
            name: getattr(plan, name)
            for name in (
                "partition",
                "qos",
                "account",
                "constraint",
                "exclude",
                "nodelist",
                "dependency",
            )
        },
        "signal": f"USR1@{plan.warn_s}",
    }
    flags: dict[str, str | None] = {name: value for name, value in asked.items() if value}
    flags["requeue" if plan.max_requeues else "no-requeue"] = None
    if plan.min_nodes:
        flags["no-kill"] = None
    if plan.dependency:
        flags["kill-on-invalid-dep"] = "yes"
    return {**flags, **options(plan.sbatch)}


def variables(plan: SlurmPlan) -> set[str]:
    """Returns sbatch's variables that would win over the script's own lines, for instance SBATCH_PARTITION."""
    other = {"time": "TIMELIMIT", "mem": "MEM_PER_NODE", "array": "ARRAY_INX"}
    names = {*directives(plan), "requeue", "no-requeue"}
    return {f"SBATCH_{other.get(name, name.upper().replace('-', '_'))}" for name in names}


def _head(plan: SlurmPlan) -> str:
    lines = (
        f"#SBATCH --{name}" + ("" if value is None else f"={_sbatch_quoted(value)}")
        for name, value in directives(plan).items()
    )
    return _text(["#!/bin/bash", *lines])


def _sbatch_quoted(value: str) -> str:
    """Quotes for sbatch's own reader of #SBATCH lines, which knows backslashes and takes an unquoted # for a comment."""
    plain = all(character.isalnum() or character in "-_./:,=%@+" for character in value)
    return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _places(plan: SlurmPlan) -> str:
    """Which run this job is, and whether it may live once more."""
    if plan.is_array:
        cases = [
            f"  {number}) ddp_kit_run={shlex.quote(run.folder)} ;;"
            for number, run in enumerate(plan.runs)
        ]
        where = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        where = [f"ddp_kit_run={shlex.quote(plan.runs[0].folder)}"]
    return _text(
        [
            *where,
            f"ddp_kit_folder={shlex.quote(plan.folder)}",
            f"ddp_kit_max_requeues={plan.max_requeues}",
            'ddp_kit_go_on="ddp-kit resubmit $(printf %q "$ddp_kit_run")"',
            'ddp_kit_say "life $ddp_kit_life of job $ddp_kit_job on $SLURM_JOB_NODELIST: $ddp_kit_run"',
            'if [ "$ddp_kit_life" -gt "$ddp_kit_max_requeues" ]; then',
            '  ddp_kit_say "the limit of $ddp_kit_max_requeues requeues is passed. To go on: $ddp_kit_go_on"',
            "  exit 1",
            "fi",
        ]
    )


def _surroundings(plan: SlurmPlan) -> str:
    """What the ranks, and the user's own lines of setup, find in their environment."""
    own = {
        "DDP_KIT_LAUNCHER": f"ddp-kit slurm, {plan.launcher}",
        "DDP_KIT_REQUEUE": "1" if plan.max_requeues else "",
        "DDP_KIT_GRACE_S": str(plan.warn_s),
        "DDP_KIT_PREFLIGHT_S": str(PREFLIGHT_S),
        "PYTHONSAFEPATH": "1"
        if plan.code
        else "",  # a program's own folder would come before the copied code
    }
    stated = {
        **{name: value for name, value in own.items() if value},
        **plan.environment,
    }  # --env A= makes it empty
    lines = [f"export {name}={shlex.quote(value)}" for name, value in stated.items()]
    lines.append(
        'export DDP_KIT_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"'
    )
    if plan.code:
        lines.append(
            f"export PYTHONPATH={shlex.quote(':'.join(plan.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
        )
    lines.append("export SUBMITIT_EXECUTOR=slurm")
    lines.append(
        '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK'
    )  # srun does not take it from sbatch
    return _text(lines)


def _setup(plan: SlurmPlan) -> str:
    """The user's own lines, each as it was typed."""
    lines = []
    for line in plan.setup:
        failed = shlex.quote(f"--setup {line}: it failed")
        lines += [line, f"if [ $? -ne 0 ]; then ddp_kit_say {failed}; exit 1; fi"]
    return _text(lines)


def _step(plan: SlurmPlan) -> str:
    """The step that starts the ranks."""
    lines = []
    if not plan.container_image:
        python = shlex.quote(plan.python)
        missing = f'ddp_kit_say {python}" is not there on $(hostname): type --python, or --setup with what makes it appear"'
        lines.append(f"command -v {python} >/dev/null || {{ {missing}; exit 127; }}")
    folder = shlex.quote(plan.folder)
    pattern = f"{folder}/%A_%a_%t_log" if plan.is_array else f"{folder}/%j_%t_log"
    tasks = '"$SLURM_NNODES"' if plan.launcher != "srun" else '"$SLURM_NTASKS"'
    # the agents that are left re-form; with an input from srun they would be killed when srun's node dies
    ends = (
        ["--no-kill", "--kill-on-bad-exit=0", "--input=none"]
        if plan.min_nodes
        else ["--kill-on-bad-exit=1"]
    )
    flags = [
        *ends,
        "--unbuffered",
        "--open-mode=append",
        f"--output={pattern}.out",
        f"--error={pattern}.err",
    ]
    container = {"container-image": plan.container_image, "container-mounts": plan.container_mounts}
    passed = {**{name: value for name, value in container.items() if value}, **options(plan.srun)}
    flags += [
        f"--{name}" + ("" if value is None else f"={shlex.quote(value)}")
        for name, value in passed.items()
    ]
    per_node = 1 if plan.launcher != "srun" else plan.processes
    program = f"bash -c {shlex.quote(TASK)} sh {shlex.quote(plan.python)} -u -m submitit.core._submit {folder}"
    lines.append(" \\\n  ".join([f"srun -n {tasks} --ntasks-per-node={per_node}", *flags, program]))
    return _text(lines)


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
