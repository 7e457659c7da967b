"""Launchers: they start the ranks of `ddp_kit.train` and see them to their end.

They import no torch and, of ddp_kit, only `io` and `errors`: what they know of a run is its
command line (`python -m ddp_kit.train RECIPE.py [flags]`), the environment variables that its
ranks read, and the files of its directory.

    one machine   local.run -> plan -> local.processes | local.torchrun | local.accelerate
    a batch job   slurm.submit -> slurm.planning -> slurm.plan -> slurm.script (text)
                  -> slurm.executor (submitit) -> sbatch;
                  on a node: script -> srun -> slurm.task -> ddp_kit.train
    many runs     runs.sweep: a slurm.plan with several runs, or local.processes one by one
    afterwards    runs.{jobs,logs,cancel,resubmit}: what runs.found reads of a run directory
                  and slurm.cluster asks of SLURM
"""
