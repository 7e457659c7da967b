"""Launches a recipe by a batch job, from a checkout.

python launch/slurm.py [flags] RECIPE.py [recipe flags]
"""

import sys
from pathlib import Path

# in place of this folder, whose names are those of packages
sys.path[0] = str(Path(__file__).resolve().parents[1])

from ddp_kit.launch.slurm.submit import main  # noqa: E402  (the path comes first)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
