"""What `slurm/dev_cluster` is made of: a real SLURM of several nodes on one machine, in one folder.

Owns: the folder, the daemons started from it, and the nodes' network. Refuses: system services, system files, fixed ports.
"""
