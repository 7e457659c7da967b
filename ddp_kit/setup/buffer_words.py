"""`Recipe(buffers=...)`: what stays of buffers that the forward pass changes, by patterns of names.

A setting without effect is refused, and so is a word that the kind of buffer does not allow.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.model_state.places import BUFFERS, Place, places_of
from ddp_kit.model_state.running_stats import STATISTICS, has_statistics

WORDS = {
    "mean": "the mean of what all micro-batches make of it",
    "sum": "the sum of all changes",
    "first": "what the first micro-batch makes of it",
    "own": "a value for each micro-batch",
}
# Of weights there is one value.
WORDS_OF_WEIGHTS = ("mean", "first")


def words_by_name(model: nn.Module, buffers: Mapping[str, str]) -> dict[str, str]:
    """Returns the word of each buffer and frozen weight that a pattern names.

    Raises: ConfigError for an unknown word, a pattern of nothing, or a word that does not fit.
    """
    if not buffers:
        return {}
    candidates = _candidates(model)
    names = {place.name: place for place in candidates}
    found: dict[str, str] = {}
    for pattern, word in buffers.items():
        if word not in WORDS:
            near = nearest(str(word), WORDS)
            hint = f" Did you mean {near!r}?" if near else ""
            listed = ", ".join(f"{name!r} ({meaning})" for name, meaning in WORDS.items())
            raise ConfigError(
                f"Recipe(buffers={{{pattern!r}: {word!r}}}): expected {listed}.{hint}"
            )
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(_refusal_of(pattern, model, list(names)))
        for name in matched:
            if found.setdefault(name, word) != word:
                raise ConfigError(
                    f"Recipe(buffers=...): two patterns say {found[name]!r} and {word!r} of {name}."
                )
            _require_fitting(names[name], word)
    return found


def _candidates(model: nn.Module) -> list[Place]:
    """Returns what a word can be said about."""
    found = []
    for place in places_of(model):
        if place.register == BUFFERS:
            is_statistic = has_statistics(place.module) and place.attribute in STATISTICS
            if not is_statistic:
                found.append(place)
        elif place.tensor is not None and not place.tensor.requires_grad:
            found.append(place)
    return found


def _refusal_of(pattern: str, model: nn.Module, names: list[str]) -> str:
    """Returns what to say of a pattern that names nothing."""
    said = f"Recipe(buffers={{{pattern!r}: ...}}): "
    others = [place for place in places_of(model) if fnmatchcase(place.name, pattern)]
    if others and others[0].register == BUFFERS:
        return f"{said}{others[0].name} is a running statistic, which is averaged anyway."
    if others:
        return (
            f"{said}{others[0].name} is trained by an optimizer; a word is said about buffers and "
            "frozen weights."
        )
    near = nearest(pattern, names)
    hint = f"it has {some(names)}." if names else "it has none."
    if near:
        hint = f"did you mean {near!r}?"
    return f"{said}the model has no buffer of that name; {hint}"


def _require_fitting(place: Place, word: str) -> None:
    """Raises: ConfigError for a word that a buffer of that kind cannot have."""
    said = f"Recipe(buffers={{{place.name!r}: {word!r}}}): "
    if place.register != BUFFERS and word not in WORDS_OF_WEIGHTS:
        raise ConfigError(f"{said}it is a frozen weight, of which 'mean' or 'first' may stay.")
    tensor = place.tensor
    if word not in ("mean", "sum"):
        return
    if tensor is None:
        raise ConfigError(f"{said}it is None at first: register it with its whole shape.")
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ConfigError(
            f"{said}it holds {str(tensor.dtype).removeprefix('torch.')}, of which 'first' or 'own' "
            "may stay."
        )
