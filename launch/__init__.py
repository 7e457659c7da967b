"""Launchers: they start the ranks of `ddp_kit.train` and see them to their end.

Owns: processes, batch jobs, signals on their way to ranks, exit codes on their way back, and what a user asks of runs from outside.
Refuses: torch, and everything of ddp_kit but its command line (`python -m ddp_kit.train RECIPE.py [flags]`), the environment variables that
its ranks read, and the files of a run directory.

    one machine    run -> plan -> local | torchrun | accelerate
    a batch job    slurm -> slurm_plan -> script (text) -> executor (submitit) -> sbatch; on a node: script -> srun -> task -> ddp_kit.train
    many runs      sweep: a slurm_plan with several runs, or local, one after another
    afterwards     jobs, logs, cancel, resubmit: what `runs` reads of a run directory and `cluster` asks of SLURM
"""
