"""Which modules of a model `--strategy fsdp` splits as one: those of a class, or from a size on.

It imports no FSDP2, so that one process and `ddp-kit plan` refuse what many ranks would.
"""

from collections import Counter
from collections.abc import Iterator

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ddp_kit.errors import ConfigError, nearest
from ddp_kit.settings import Fsdp

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# The last one is attention's output projection: attention reads its weight and never calls it.
NEVER_CALLED = (*CONTAINERS, NonDynamicallyQuantizableLinear)


def modules_to_wrap(model: nn.Module, settings: Fsdp) -> list[nn.Module]:
    """Returns the modules that are split as one, inner ones first.

    A module that shares a parameter with one outside it is left to those around it: FSDP2 would
    make two parameters of a tied one.

    Raises: ConfigError if a class is not in the model or never called, or if nothing is left to
        split though a flag asks for it.
    """
    _require_wrappable(model, settings.wrap)
    inner = [module for module in model.modules() if module is not model]
    chosen = [module for module in inner if type(module).__name__ in settings.wrap]
    if settings.wrap_size:
        for module in _smallest_of_size(model, settings.wrap_size):
            if module not in chosen:
                chosen.append(module)

    occurrences = _occurrences(model)
    closed = []
    for module in chosen:
        if isinstance(module, NEVER_CALLED):
            continue
        own = _occurrences(module)
        if all(count == occurrences[identity] for identity, count in own.items()):
            closed.append(module)
    if (settings.wrap or settings.wrap_size) and not closed:
        raise ConfigError(
            "--fsdp.wrap, --fsdp.wrap-size: nothing is left to split by itself: no module that is "
            "called is so large, or it shares parameters with the rest. Name another class, type "
            "a smaller size, or leave it out."
        )
    order = {id(module): i for i, module in enumerate(inner)}
    return sorted(closed, key=lambda module: -order[id(module)])


def _require_wrappable(model: nn.Module, names: tuple[str, ...]) -> None:
    """Raises: ConfigError for a class that the model does not have, or whose modules are never
    called."""
    kinds = sorted({type(module).__name__ for module in model.modules()})
    containers = {kind.__name__ for kind in CONTAINERS}
    for name in names:
        if name not in kinds:
            near = nearest(name, kinds)
            hint = f"Did you mean {near}?" if near else f"It has {', '.join(kinds)}."
            raise ConfigError(f"--fsdp.wrap {name}: the model has no module of that class. {hint}")
        if name in containers:
            raise ConfigError(
                f"--fsdp.wrap {name}: it is never called itself, so nothing would be gathered. "
                "Name the class of what it holds."
            )


def _occurrences(model: nn.Module) -> Counter[int]:
    """Returns of each parameter, by its identity, in how many places of the model it is."""
    found: Counter[int] = Counter()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] += 1
    return found


def _smallest_of_size(model: nn.Module, size: int) -> Iterator[nn.Module]:
    """Yields the smallest modules that have at least `size` parameters and are called."""
    for child in model.children():
        if sum(parameter.numel() for parameter in child.parameters()) < size:
            continue
        inner = list(_smallest_of_size(child, size))
        if inner:
            yield from inner
        elif not isinstance(child, NEVER_CALLED):
            yield child
