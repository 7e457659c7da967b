"""What a recipe is, and finding one.

A recipe is a Settings dataclass and a function named `recipe`, in a file or a module: there is no
class to inherit from, and nothing to register.
"""

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from ddp_kit.data.seeding import made_under_seed
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.io.hidden_packages import hint_of_hidden
from ddp_kit.metrics import LossSum, Number
from ddp_kit.settings import Settings
from ddp_kit.trackers.base import Tracker

Loaded = TypeVar("Loaded")
Loss = Callable[[Any, Any], LossSum]
Scheduler = Callable[[Optimizer, int], Any]
Pairs = Mapping[str, Sequence[Number] | torch.Tensor]


class Callback(Protocol):
    """Observes a run on every rank; what it returns is not looked at."""

    def on_start(self, model: nn.Module) -> None:
        """Before the first step."""

    def on_step(self, step: int) -> None:
        """After `step` optimizer steps."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation; `metrics` are the same on all ranks."""

    def on_end(self, reason: str) -> None:
        """After the last step of a run that did not fail."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One of several losses, each with its own optimizer, gradients, clipping and loss scale.

    `trains` names the part of the model whose parameters it trains (a dotted path; "" is the whole
    model).
    """

    loss: Loss
    optimizer: Callable[[Any], Optimizer]
    scheduler: Scheduler | None = None
    trains: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts of a run, as factories: strategies and seeding decide when to call them.

    Args:
        model: `model()`.
        train_data: `train_data()`, a `Data` or a bare data set.
        loss: `loss(model, batch) -> LossSum`.
        optimizer: `optimizer(model)`.
        scheduler: `scheduler(optimizer, total_steps)`, stepped once per optimizer step.
        eval_data: `eval_data()`, one data set, or several by name.
        test_data: `test_data()`, alike.
        evaluate: `evaluate(model, batch) -> {name: (sum, count) or rows}` (default: the loss's
            sums).
        summarize: `summarize(means, rows) -> {name: float}`; rank 0's is everybody's.
        samples: `samples(model) -> {name: image or text}`, on all ranks.
        objectives: in place of loss and optimizer.
        callbacks: observers of the run, on every rank.
        trackers: receivers of its records, on rank 0.
        buffers: what stays of buffers and frozen weights that the forward pass changes, by
            patterns of names: "mean", "sum", "first" or "own".
        frozen: patterns of names of parameters that are frozen for the whole run, or
            `frozen(epoch)`, which returns those of an epoch.
        flops_per_sample: of its forward and backward pass, from which train records on known CUDA
            devices have `mfu`.

    Raises: ConfigError if it has neither or both of a loss and objectives, or two objectives train
        the same part.
    """

    model: Callable[[], nn.Module]
    train_data: Callable[[], Any]
    loss: Loss | None = None
    optimizer: Callable[[Any], Optimizer] | None = None
    scheduler: Scheduler | None = None
    eval_data: Callable[[], Any] | None = None
    test_data: Callable[[], Any] | None = None
    evaluate: Callable[[Any, Any], Pairs] | None = None
    summarize: Callable[[dict[str, float], dict[str, torch.Tensor]], Mapping[str, float]] | None = (
        None
    )
    samples: Callable[[Any], Mapping[str, Any]] | None = None
    objectives: Sequence[Objective] = ()
    callbacks: Sequence[Callback] = ()
    trackers: Sequence[Tracker] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    frozen: Sequence[str] | Callable[[int], Sequence[str]] = ()
    flops_per_sample: float = 0.0

    def __post_init__(self) -> None:
        if self.objectives and (self.loss or self.optimizer or self.scheduler):
            raise ConfigError(
                "a recipe has either `objectives` or its own loss, optimizer and scheduler, not "
                "both."
            )
        parts = [part.trains for part in self.objectives]
        if len(set(parts)) < len(parts):
            raise ConfigError(
                f"two objectives train the same part of the model ({', '.join(parts)}); put their "
                "losses into one."
            )
        if not self.objectives and (self.loss is None or self.optimizer is None):
            raise ConfigError("a recipe needs `loss` and `optimizer`, or `objectives`.")

    def parts(self) -> list[Objective]:
        """Returns the objectives in order; a plain recipe is one of them."""
        if self.objectives:
            return list(self.objectives)
        assert self.loss is not None
        assert self.optimizer is not None
        return [Objective(loss=self.loss, optimizer=self.optimizer, scheduler=self.scheduler)]


@dataclass(frozen=True)
class RecipeSource:
    """A loaded recipe: its Settings class and function, where it came from and its text."""

    name: str
    path: Path
    text: str
    settings: type[Settings]
    build: Callable[[Any], Recipe]

    @property
    def sha256(self) -> str:
        """The hash of the recipe's text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def load_recipe(spec: str) -> RecipeSource:
    """Loads a recipe by file path (`recipes/cifar.py`) or as a module (`package.module`).

    Raises: ConfigError if it is missing, not Python, raises on import, or has no `recipe` function
        or Settings.
    """
    is_file = spec.endswith(".py") or "/" in spec or Path(spec).exists()
    # The seed of a run stands in the settings, which are not known yet.
    module = made_under_seed(
        lambda: _from_file(Path(spec)) if is_file else _from_module(spec), seed=0, what="import"
    )
    build = getattr(module, "recipe", None)
    if not callable(build) or isinstance(build, type):
        raise ConfigError(
            f"{spec} has no function `recipe(settings)`. `ddp-kit new my.py --from digits` writes "
            "one to start from."
        )
    settings = getattr(module, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, Settings)):
        raise ConfigError(
            f"{spec} has no class `Settings(ddp_kit.Settings)`: a frozen dataclass with the "
            "recipe's flags and defaults."
        )
    _refuse_settings(settings, spec)
    if not _accepts_one(build):
        raise ConfigError(f"{spec}: `recipe` must take one argument, the settings.")
    path = Path(inspect.getfile(module)).resolve()

    @functools.wraps(build)
    def build_under_seed(given: Settings) -> Recipe:
        made: Recipe = made_under_seed(build, given, seed=given.seed, what="recipe")
        return made

    return RecipeSource(path.stem, path, path.read_text(), settings, build_under_seed)


def _refuse_settings(settings: type[Settings], spec: str) -> None:
    """Raises: ConfigError if Settings is no dataclass of its own, or has a field without a
    default."""
    # Its own fields, not those of the class above it.
    if "__dataclass_fields__" not in vars(settings):
        raise ConfigError(
            f"{spec}: Settings is no dataclass; its fields would be no flags. "
            "Put @dataclass(frozen=True, kw_only=True) above it."
        )
    without = [field.name for field in fields(settings) if not _has_default(field)]
    if without:
        raise ConfigError(
            f"{spec}: Settings needs a default for {', '.join(without)}: a recipe runs without "
            "flags."
        )


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _accepts_one(build: Callable[..., Any]) -> bool:
    try:
        inspect.signature(build).bind(None)
    except TypeError:
        return False
    return True


def _from_file(path: Path) -> ModuleType:
    """Raises: ConfigError if there is no such Python file, or it raises on import."""
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"recipe {path}: {_fault_of(path)}.{_hint_for(path)}")
    # A spawned loader worker imports it by this name, so it is the file's own wherever it can be: a
    # dash does no harm, a dot would.
    name = path.stem
    if "." in name or name in sys.modules:
        name = f"recipe_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and spawned loader workers look it up there.
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    loader = spec.loader
    _import(lambda: loader.exec_module(module), str(path), folder=folder)
    return module


def _fault_of(path: Path) -> str:
    if path.is_dir():
        return "it is a folder"
    return "not a Python file" if path.exists() else "no such file"


def _hint_for(path: Path) -> str:
    near = ""
    if path.parent.is_dir():
        near = nearest(path.name, [other.name for other in path.parent.glob("*.py")])
    if near:
        return f" Did you mean {path.parent / near}?"
    return " Expected a .py file or a module's dotted name."


def _from_module(name: str) -> ModuleType:
    """Raises: ConfigError if there is no such module, or it raises on import."""
    # As `python -m` has it; a console script does not.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if not _import(lambda: _is_found(name), name):
        raise ConfigError(
            f"recipe {name}: neither a file nor a module that can be found. Expected a path such "
            "as recipes/digits.py, or package.module."
        )
    return _import(lambda: importlib.import_module(name), name)


def _is_found(name: str) -> bool:
    """Whether there is such a module; the packages around it are imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            # It is something that its package imports.
            raise
        return False
    except ValueError:
        # A relative name, or a name with empty parts.
        return False


def _import(load: Callable[[], Loaded], where: str, *, folder: str = "") -> Loaded:
    """Returns what `load` does.

    Args: `folder` of the recipe, which stands first among those that Python imports from.
    Raises: ConfigError for whatever the user's own code raises, with its traceback.
    """
    try:
        return load()
    except SyntaxError as error:
        raise ConfigError(f"recipe {where} is not Python: {error}") from error
    except Exception as error:
        frames = "".join(traceback.format_exception(error)).rstrip()
        said = f"recipe {where} raises when it is imported:\n{frames}{hint_of_hidden(folder)}"
        raise ConfigError(said) from error
