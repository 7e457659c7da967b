"""A folder as users have them: a recipe, and modules named like folders of our checkout."""

import shutil
from pathlib import Path

from paths import KIT

NAMES = ("recipes", "tests", "slurm", "runs")
FAULT = "raise SystemExit('the module of the user in place of ours')\n"


def make_users_folder(folder: Path, *, launch: str) -> Path:
    """Makes it, with a `launch.py` or a `launch` that end whatever imports them. Returns: it."""
    folder.mkdir(parents=True)
    for name in ("paced.py", "cases.py"):
        shutil.copy(KIT / name, folder)
    (folder / "paced.py").rename(folder / "recipe.py")
    packages = [*NAMES]
    if launch == "launch":
        packages.append(launch)
    else:
        (folder / launch).write_text(FAULT)
    for name in packages:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(FAULT)
    return folder
