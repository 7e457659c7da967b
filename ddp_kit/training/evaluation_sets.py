"""The data sets that a recipe evaluates: one, or several by name; the same on all ranks."""

from collections.abc import Callable, Mapping
from typing import Any

from ddp_kit.data.agreement import require_same_lengths
from ddp_kit.data.dataset import Data, as_evaluation_data
from ddp_kit.data.seeding import made_under_seed
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, DataError
from ddp_kit.recipe import Recipe
from ddp_kit.settings import Settings


def named(what: str, prefix: str) -> str:
    """Returns what a data set is called in errors: `evaluation data`, or `evaluation data NAME`."""
    if not prefix:
        return what
    return f"{what} {prefix.removesuffix('/')}"


def evaluation_sets(recipe: Recipe, settings: Settings, group: Group) -> Mapping[str, Data]:
    """Returns the recipe's evaluation sets. Every rank calls it.

    Raises: ConfigError for a set whose metrics would stand under the name of the test data's.
    """
    sets = made_sets(recipe.eval_data, what="evaluation", seed=settings.seed, group=group)
    if "test/" in sets and recipe.test_data is not None:
        raise ConfigError(
            "one of the sets of eval_data is named 'test', as the metrics of test_data are in "
            "status.json: name it otherwise."
        )
    return sets


def data_sets(given: Any, *, what: str) -> dict[str, Data]:
    """Returns one data set, or several by name, as {prefix: Data}.

    Args: `what` data it is: evaluation or test.
    Raises: DataError if one is empty; ConfigError for what has no effect on such data.
    """
    sets = _by_prefix(given, what=what)
    _refuse_empty(sets, what=what)
    return sets


def made_sets(
    make: Callable[[], Any] | None, *, what: str, seed: int, group: Group
) -> dict[str, Data]:
    """Calls a recipe's `eval_data` or `test_data`. Every rank calls it.

    Returns: the sets as `data_sets` does; {} without `make`.
    Raises: DataError on every rank if they have different sets; else as `data_sets`.
    """
    sets: dict[str, Data] = {}
    if make is not None:
        sets = _by_prefix(made_under_seed(make, seed=seed, what=f"{what} data"), what=what)
    lengths = {prefix.removesuffix("/"): data.shared_length for prefix, data in sets.items()}
    require_same_lengths(group, lengths, what=f"{what} data")
    _refuse_empty(sets, what=what)
    return sets


def _by_prefix(given: Any, *, what: str) -> dict[str, Data]:
    several = given if isinstance(given, Mapping) else {"": given}
    sets = {}
    for name, data in several.items():
        prefix = f"{name}/" if name else ""
        sets[prefix] = as_evaluation_data(data, what=named(f"{what} data", prefix))
    return sets


def _refuse_empty(sets: Mapping[str, Data], *, what: str) -> None:
    for prefix, data in sets.items():
        if not data.is_iterable and not len(data):
            raise DataError(f"the {named(f'{what} data', prefix)} is empty.")
