"""`ddp-kit new my.py --from cifar`: a recipe of one's own, to start from.

Owns: where the shipped recipes are, in a checkout and in an installed wheel. Refuses: to overwrite, and to edit what it copies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ddp_kit.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = (
    PACKAGE / "_recipes",
    PACKAGE.parent / "recipes",
)  # inside a wheel; beside the package in a checkout


def main(argv: Sequence[str]) -> int:
    """Copies a shipped recipe. Returns: 0. Raises: ConfigError if the name is unknown or the destination taken."""
    import tyro

    def new(
        destination: tyro.conf.Positional[Path],
        *,
        source: Annotated[str, tyro.conf.arg(name="from")] = "digits",
    ) -> None:
        """Copies a shipped recipe to start your own from.

        Args:
            destination: the file to write, for instance my.py
            source: name of the shipped recipe
        """
        _copy(find_recipe(source), destination)

    tyro.cli(new, args=argv, prog="ddp-kit new")
    return 0


def find_recipe(name: str) -> Path:
    """Returns the file of a shipped recipe, `cifar` or `cifar.py`. Raises: ConfigError with the list and the nearest name."""
    recipes = {
        path.stem: path for folder in reversed(SHIPPED) for path in sorted(folder.glob("[a-z]*.py"))
    }
    wanted = name.removesuffix(".py")
    if wanted in recipes:
        return recipes[wanted]
    near = nearest(wanted, recipes)
    hint = f" Did you mean --from {near}?" if near else ""
    raise ConfigError(
        f"--from {name}: no such recipe. Shipped are: {', '.join(sorted(recipes)) or 'none'}.{hint}"
    )


def _copy(recipe: Path, destination: Path) -> None:
    if destination.suffix != ".py":
        raise ConfigError(
            f"{destination}: a recipe is a Python file. Type: ddp-kit new {destination.with_suffix('.py')}"
        )
    if not destination.parent.is_dir():
        raise ConfigError(
            f"{destination}: there is no folder {destination.parent}. Type: mkdir -p {destination.parent}"
        )
    text = recipe.read_text(encoding="utf-8")
    try:
        with destination.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(
            f"{destination}: exists already and is not overwritten. Type another name."
        ) from None
    print(f"{destination}: a copy of the shipped recipe {recipe.stem}. Next:\n")
    if "\ndef recipe(" in text:
        print(
            f"  ddp-kit check {destination}      two steps and an evaluation, memory, rate, time to finish; leaves nothing"
        )
        print(f"  torchrun --nproc_per_node=2 -m ddp_kit.train {destination} --help")
    else:
        print(f"  torchrun --nproc_per_node=2 {destination}")
