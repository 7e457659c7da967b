"""The points of a sweep: every combination of some values of flags, and the name of each."""

import itertools
import re
from collections.abc import Mapping, Sequence

from ddp_kit.launch.plan import LaunchError

Point = Mapping[str, str]


def points_of(grids: Sequence[str]) -> list[dict[str, str]]:
    """Returns every combination of `NAME=V1,V2,...`, the last name changing fastest.

    Raises: LaunchError with all faults.
    """
    axes: dict[str, list[str]] = {}
    faults = []
    for grid in grids:
        name, equals, values = grid.partition("=")
        if not equals or not name or not all(values.split(",")):
            faults.append(
                f"--grid {grid}: expected a flag of the recipe and its values, "
                "for instance --grid lr=0.1,0.2"
            )
        elif name.replace("_", "-") == "run-dir":
            faults.append(
                f"--grid {grid}: the points have folders of their own. "
                "--name NAME puts them into runs/NAME"
            )
        elif name in axes:
            faults.append(f"--grid {name} is given twice")
        axes[name] = list(dict.fromkeys(values.split(",")))
        if len({folder_of({name: value}) for value in axes[name]}) < len(axes[name]):
            faults.append(f"--grid {grid}: some of these values make the same folder name")
    if not grids:
        faults.append("--grid is missing: ddp-kit sweep --grid lr=0.1,0.2 RECIPE.py")
    if faults:
        raise LaunchError("; ".join(faults) + ".")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def folder_of(point: Point) -> str:
    """Returns the name of a point's run directory."""
    return re.sub(r"[/%\\\n]", "_", ",".join(f"{name}={value}" for name, value in point.items()))


def flags_of(point: Point) -> list[str]:
    """Returns a point as flags of the recipe."""
    words = []
    for name, value in point.items():
        words += [f"--{name}", value]
    return words
