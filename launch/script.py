"""The batch script of a plan, as text: a pure function, so that `--dry-run` shows the very bytes that are submitted.

Owns: every line that SLURM and bash read. Refuses: writing or submitting it.

The script's shell outlives its step: the ranks save on a signal, and only then the job is requeued. Its exit code is the job's truth.
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from launch.slurm_plan import SlurmPlan, options

PREFLIGHT_S = 60
TOLD = """\
told=""
trap 'told=yes' TERM                              # scancel and scontrol requeue tell this shell too; a preemption tells the ranks alone
say() { printf '%(%Y-%m-%dT%H:%M:%S%z)T ddp-kit: %s\\n' -1 "$*"; }
life=${SLURM_RESTART_COUNT:-0}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}
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
step=$!
rc=0
while kill -0 "$step" 2>/dev/null; do             # a signal to this shell ends a wait, not the step
  wait "$step"
  rc=$?
done
wait "$step"
last=$?
if [ "$last" -ne 127 ]; then rc=$last; fi         # 127: the loop has had its code already
first=""
if [ -e "$failed" ]; then read -r first < "$failed"; fi
case "$first:$rc" in                              # srun ends the tasks after the one that failed, and tells the largest code
  :* | *:137 | 143:13[0-9]) ;;                    # a task that was killed, or has crashed, could not say so: srun does
  *) rc=$first ;;
esac
"""
END = """\
again=""
if [ -e "$run/requeue" ]; then                    # rank 0 leaves it when a stopped run is saved
  again=yes
elif [ "$rc" -eq 143 ] && [ "$max_requeues" -gt 0 ]; then  # preempted before the first step: no task has failed before its SIGTERM
  again=yes
fi
if [ -n "$again" ]; then
  rc=75
  if [ -n "$told" ]; then
    say "life $life of job $job has stopped with nothing lost; SLURM itself ends or requeues the job"
  elif [ "$life" -ge "$max_requeues" ]; then
    say "life $life of job $job has stopped with nothing lost: --max-requeues $max_requeues is reached. To go on: $go_on"
  elif scontrol requeue "$job" || [ -n "$told" ]; then  # SLURM tells scontrol too, at once
    say "life $life of job $job has stopped with nothing lost: requeued"
  else
    say "life $life of job $job has stopped with nothing lost: it could not be requeued. To go on: $go_on"
  fi
fi
say "life $life of job $job ends with exit code $rc"
exit "$rc"
"""


def render(plan: SlurmPlan) -> str:
    """Returns the batch script."""
    return "".join([_head(plan), "\n", TOLD, _places(plan), "\n", _surroundings(plan), "\n", _step(plan), WAIT, "\n", END])


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
        "cpus-per-task": str(plan.cpus_per_task * (plan.processes if one_task else 1)) if plan.cpus_per_task else "",
        "gpus-per-node": str(plan.gpus_per_node) if plan.gpus_per_node else "",
        "mem": plan.memory,
        "time": plan.time,
        "array": f"0-{len(plan.runs) - 1}{every}" if plan.is_array else "",
        **{name: getattr(plan, name) for name in ("partition", "qos", "account", "constraint", "exclude", "nodelist", "dependency")},
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
    lines = (f"#SBATCH --{name}" + ("" if value is None else f"={_sbatch_quoted(value)}") for name, value in directives(plan).items())
    return _text(["#!/bin/bash", *lines])


def _sbatch_quoted(value: str) -> str:
    """Quotes for sbatch's own reader of #SBATCH lines, which knows backslashes and takes an unquoted # for a comment."""
    plain = all(character.isalnum() or character in "-_./:,=%@+" for character in value)
    return value if plain else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _places(plan: SlurmPlan) -> str:
    """Which run this job is, and whether it may live once more."""
    if plan.is_array:
        cases = [f"  {number}) run={shlex.quote(run.folder)} ;;" for number, run in enumerate(plan.runs)]
        where = ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        where = [f"run={shlex.quote(plan.runs[0].folder)}"]
    return _text(
        [
            *where,
            f"folder={shlex.quote(plan.folder)}",
            f"max_requeues={plan.max_requeues}",
            'go_on="ddp-kit resubmit $(printf %q "$run")"',
            'say "life $life of job $job on $SLURM_JOB_NODELIST: $run"',
            'if [ "$life" -gt "$max_requeues" ]; then',
            '  say "the limit of $max_requeues requeues is passed. To go on: $go_on"',
            "  exit 1",
            "fi",
        ]
    )


def _surroundings(plan: SlurmPlan) -> str:
    """What the ranks find in their environment, and the user's own lines of setup."""
    own = {
        "DDP_KIT_LAUNCHER": f"ddp-kit slurm, {plan.launcher}",
        "DDP_KIT_REQUEUE": "1" if plan.max_requeues else "",
        "DDP_KIT_GRACE_S": str(plan.warn_s),
        "DDP_KIT_PREFLIGHT_S": str(PREFLIGHT_S),
        "PYTHONSAFEPATH": "1" if plan.code else "",  # a program's own folder would come before the copied code
    }
    stated = {**{name: value for name, value in own.items() if value}, **plan.environment}  # --env A= makes it empty
    lines = [f"export {name}={shlex.quote(value)}" for name, value in stated.items()]
    lines.append('export DDP_KIT_HOSTS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd, -)"')
    if plan.code:
        lines.append(f"export PYTHONPATH={shlex.quote(':'.join(plan.code))}${{PYTHONPATH:+:$PYTHONPATH}}")
    lines.append("export SUBMITIT_EXECUTOR=slurm")
    lines.append('[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK')  # srun does not take it from sbatch
    for line in plan.setup:
        failed = shlex.quote(f"--setup {line}: it failed")
        lines += [line, f"if [ $? -ne 0 ]; then say {failed}; exit 1; fi"]
    if not plan.container_image:
        python = shlex.quote(plan.python)
        missing = f'say {python}" is not there on $(hostname): type --python, or --setup with what makes it appear"'
        lines.append(f"command -v {python} >/dev/null || {{ {missing}; exit 127; }}")
    return _text(lines)


def _step(plan: SlurmPlan) -> str:
    """The step that starts the ranks, in the background: a shell that waits for a program in front of it hears no signal."""
    pattern = '"$folder"/%A_%a_%t_log' if plan.is_array else '"$folder"/%j_%t_log'
    tasks = '"$SLURM_NNODES"' if plan.launcher != "srun" else '"$SLURM_NTASKS"'
    # the agents that are left re-form; with an input from srun they would be killed when srun's node dies
    ends = ["--no-kill", "--kill-on-bad-exit=0", "--input=none"] if plan.min_nodes else ["--kill-on-bad-exit=1"]
    flags = [*ends, "--unbuffered", "--open-mode=append", f"--output={pattern}.out", f"--error={pattern}.err"]
    container = {"container-image": plan.container_image, "container-mounts": plan.container_mounts}
    passed = {**{name: value for name, value in container.items() if value}, **options(plan.srun)}
    flags += [f"--{name}" + ("" if value is None else f"={shlex.quote(value)}") for name, value in passed.items()]
    per_node = 1 if plan.launcher != "srun" else plan.processes
    program = f'bash -c {shlex.quote(TASK)} sh {shlex.quote(plan.python)} -u -m submitit.core._submit "$folder" &'
    return _text(
        [
            "failed=$folder/$job.$life.failed",
            'rm -f "$run/requeue" "$failed" "$folder/$SLURM_JOB_ID.$life".{port,over}',
            " \\\n  ".join([f"srun -n {tasks} --ntasks-per-node={per_node}", *flags, program]),
        ]
    )


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
