"""Launchers: they start the ranks of `ddp_kit.train` and see them to their end.

Owns: processes, batch jobs, signals on their way to ranks, and exit codes on their way back. Refuses: torch, and everything of ddp_kit but
its command line (`python -m ddp_kit.train RECIPE.py [flags]`) and the environment variables that its ranks read.
"""
