"""The errors that users see, and the helpers that word them.

There is one class for each exit code. What can only be a bug of ours is an `assert`, not one of
these.
"""

import difflib
import importlib
import itertools
from collections.abc import Iterable, Sequence
from types import ModuleType


class DdpKitError(Exception):
    """A failure with a message for the user: what was given and expected, and what to type."""

    exit_code = 1

    def __init__(self, *args: object, rank: int = -1) -> None:
        """Args: `rank` whose fault it is, where every rank raises it; -1: of who raises it."""
        super().__init__(*args)
        self.rank = rank


class ConfigError(DdpKitError):
    """Settings, flags, environment or recipe cannot be run as given."""

    exit_code = 2


class MissingPackageError(ConfigError):
    """An optional package is needed by what was asked for and is not installed."""


class DataError(DdpKitError):
    """A data set is missing, empty or not what it should be."""


class NonFiniteError(DdpKitError):
    """A loss or gradient is not finite; the step was not applied."""


def text_of(error: BaseException) -> str:
    """Returns an error's message, or that it has none: the `str` of a user's own error may fail."""
    try:
        return str(error)
    except Exception as failure:
        return f"(its message cannot be made: {type(failure).__name__})"


def summary(error: BaseException) -> str:
    """Returns kind and message of an error.

    Of one that torch brought from a loader worker they are the worker's own.
    """
    text = text_of(error)
    lines = text.strip().splitlines()
    # Torch puts the worker's whole traceback into the message.
    if len(lines) > 1 and lines[1].startswith("Original Traceback"):
        return f"{_raised(lines)} (in a loader worker)"
    return f"{type(error).__name__}: {text}"


def _raised(traceback: Sequence[str]) -> str:
    """Returns the line of a traceback that names the error: notes and the rest of a message of
    several lines come after it.
    """
    found = traceback[-1]
    for before, line in itertools.pairwise(traceback):
        if before.startswith(" ") and line and not line.startswith(" "):
            found = line
    return found


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Returns the candidate closest to `name`, or "" if none is near."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.55)
    return close[0] if close else ""


def some(names: Sequence[str]) -> str:
    """Returns up to five names, and how many more there are."""
    more = len(names) - 5
    listed = ", ".join(names[:5])
    return f"{listed} and {more} more" if more > 0 else listed


def no_gradient(names: Sequence[str], *, is_split: bool) -> str:
    """Returns what to say of parameters that a rank left out.

    Args: `is_split` the strategy cannot sum without them, whatever the flags.
    """
    flags = "--strategy zero1 --find-unused-parameters" if is_split else "--find-unused-parameters"
    return (
        f"{some(names)} got no gradient, and the other ranks would wait for it."
        f" If the loss leaves parameters out in some steps, type {flags}"
    )


def flag_changed(names: Sequence[str], *, now: bool) -> str:
    """Returns what to say of parameters whose `requires_grad` is another one than at the start."""
    return (
        f"requires_grad of {some(names)} was changed to {now} after the start, by a callback, the "
        "loss, `evaluate` or the loop: the other ranks and checkpoints would not know of it. "
        "Say which parameters are frozen in which epoch, by patterns of their names: "
        f'Recipe(frozen=lambda epoch: ["{names[0]}"] if epoch < 1 else []), or of the whole run: '
        f'Recipe(frozen=["{names[0]}"]); of a loop of one\'s own: wrap(frozen=...).'
    )


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional package on use.

    Args: `module` its name, with dots or without; `extra` the extra of ddp_kit that installs it.
    Raises: MissingPackageError with the install line if the package itself is not there; an error
        inside it passes through.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        package = module.split(".")[0]
        raise MissingPackageError(
            f"{package} is needed here and not installed. Type: pip install 'ddp_kit[{extra}]'"
        ) from error
