"""`ddp-kit new my.py --from cifar`: a recipe of one's own, to start from.

It knows where the shipped recipes are, in a checkout and in an installed wheel. Nothing is
overwritten: a user's own work may be in the file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from ddp_kit.errors import ConfigError, nearest

PACKAGE = Path(__file__).resolve().parent.parent
# Inside a wheel; beside the package in a checkout.
SHIPPED = (PACKAGE / "_recipes", PACKAGE.parent / "recipes")


def main(argv: Sequence[str]) -> int:
    """Copies a shipped recipe.

    Returns: 0.
    Raises: ConfigError if the name is unknown, or the destination is taken, no Python file or in no
        folder.
    """
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
    """Returns the file of a shipped recipe, `cifar` or `cifar.py`, or of a ported program, `dino`
    or `ported/dino`.

    Raises: ConfigError with the list and the nearest name if there is none.
    """
    recipes: dict[str, Path] = {}
    ported: dict[str, Path] = {}
    for folder in reversed(SHIPPED):
        recipes |= {path.stem: path for path in sorted(folder.glob("[a-z]*.py"))}
        ported |= {path.stem: path for path in sorted(folder.glob("ported/[a-z]*.py"))}
    wanted = name.removesuffix(".py").removeprefix("ported/")
    if wanted in recipes and not name.startswith("ported/"):
        return recipes[wanted]
    if wanted in ported:
        return ported[wanted]
    near = nearest(wanted, [*recipes, *ported])
    hint = f" Did you mean --from {near}?" if near else ""
    shipped = ", ".join(sorted(recipes)) or "none"
    if ported:
        shipped += f"; other people's programs: {', '.join(sorted(ported))}"
    raise ConfigError(f"--from {name}: no such recipe. Shipped are: {shipped}.{hint}")


def _copy(recipe: Path, destination: Path) -> None:
    if destination.suffix != ".py":
        mended = destination.with_suffix(".py")
        raise ConfigError(f"{destination}: a recipe is a Python file. Type: ddp-kit new {mended}")
    folder = destination.parent
    if not folder.is_dir():
        raise ConfigError(f"{destination}: there is no folder {folder}. Type: mkdir -p {folder}")
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
        what = "two steps and an evaluation, memory, rate, time to finish; leaves nothing"
        print(f"  ddp-kit check {destination}      {what}")
        print(f"  torchrun --nproc_per_node=2 -m ddp_kit.train {destination} --help")
    else:
        print(f"  torchrun --nproc_per_node=2 {destination}")
