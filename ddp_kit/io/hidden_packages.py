"""Packages that a user's files hide: those in a recipe's folder are found before them."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path


def hint_of_hidden(folder: str) -> str:
    """Returns what to add to the error of an import, "" if no file of the folder was imported in
    place of a package.
    """
    hidden = _hidden_by(Path(folder)) if folder else []
    if not hidden:
        return ""
    name = hidden[0]
    return (
        f"\nThe recipe's folder has a file of the name of a package: `import {name}` finds "
        f"{folder}/{name}.py, as with `python SCRIPT`. Rename the file if the package is meant."
    )


def _hidden_by(folder: Path) -> list[str]:
    """Returns the names of packages that files of a folder were imported in place of."""
    others = [path for path in sys.path if path and Path(path).resolve() != folder]
    found = []
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if "." in name or not file or Path(file).parent != folder:
            continue
        if name in sys.stdlib_module_names or PathFinder.find_spec(name, others) is not None:
            found.append(name)
    return found
