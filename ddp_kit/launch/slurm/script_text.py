"""The parts of the batch script that are the same in every job.

The script's shell outlives its step: the ranks save on a signal, and only then the job is
requeued. Its exit code is the job's truth.
"""
# ruff: noqa: E501  (bash reads these lines as they are)

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
# on each node
TASK = """\
trap "" USR1 USR2  # the warning may come before the program can hear it, and an agent of torchrun would die of it
if ! command -v "$1" >/dev/null; then
  echo "ddp-kit: $1 is not there on $(hostname): type --python, or --setup with what makes it appear" >&2
  exit 127
fi
exec "$@"\
"""
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
