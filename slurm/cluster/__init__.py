"""What `slurm/dev_cluster` is made of: a real SLURM of several nodes on one machine, in one folder.

It takes no system service, no file of the system's and no fixed port: several live side by side.
"""
