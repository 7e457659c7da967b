"""`--init-from`: weights of another run, or of plain safetensors files, into a model by name.

Weights alone: an optimizer's state belongs to the run that made it. An evaluation also takes what a
checkpoint holds of the model beside its weights. No pickle is loaded, since loading one may run
code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ddp_kit.checkpoint.extra_state import put_extra
from ddp_kit.checkpoint.find import find, is_checkpoint, origin_of, weights_of
from ddp_kit.checkpoint.format.fit import Kind, misfits, require_fit, table
from ddp_kit.checkpoint.format.opened import Opened
from ddp_kit.checkpoint.weights import base_sha256, tied_names
from ddp_kit.distributed.local_shard import Held, held
from ddp_kit.distributed.process_group import Group
from ddp_kit.errors import ConfigError, nearest, some
from ddp_kit.io.logs import logger
from ddp_kit.model_state.attributes import put_saved

PICKLES = (".pth", ".pt", ".bin", ".ckpt")
CONVERT = (
    " It looks like a pickle, and loading one may run code. Convert a file that you trust, once:\n"
    '  python -c "import sys, torch; from safetensors.torch import save_file; '
    "    save_file({n: t.clone() for n, t in "
    'torch.load(sys.argv[1], weights_only=True).items()}, sys.argv[2])" %s %s'
)


def _opened(path: Path, *, group: Group) -> Opened | None:
    """Opens a run or a checkpoint; None for files of weights. Every rank calls it.

    Raises: ConfigError if there is no good checkpoint in it.
    """
    if not is_checkpoint(path):
        return None
    opened = find(origin_of(path, flag_text="--init-from"), group=group)
    if opened is None:
        raise ConfigError(f"--init-from {path}: there is no good checkpoint in it.")
    return opened


def _weights_in(opened: Opened) -> dict[str, torch.Tensor]:
    weights = weights_of(opened)
    # What a run has registered in its forward pass.
    for name, is_persistent in opened.values.get("reshaped", {}).items():
        if not is_persistent:
            del weights[name]
    return weights


def _safetensors_files(path: Path) -> list[Path]:
    """Returns a path's files. Raises: ConfigError if there are none."""
    files = [path]
    missing = "no such file"
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        missing = "none is in it"
    if not files or not all(file.is_file() for file in files):
        raise ConfigError(
            f"--init-from {path}: expected a run, a checkpoint, a .safetensors file or a folder of "
            f"them; {missing}."
        )
    return files


def _read_file(file: Path) -> dict[str, torch.Tensor]:
    """Returns a safetensors file's tensors. Raises: ConfigError if it is not a whole one."""
    try:
        with safe_open(file, framework="pt") as content:
            names = content.keys()
            return {name: content.get_tensor(name) for name in names}
    except SafetensorError as error:
        hint = ""
        if file.suffix in PICKLES:
            hint = CONVERT % (file, file.with_suffix(".safetensors"))
        raise ConfigError(
            f"--init-from {file}: not a whole safetensors file: {error}.{hint}"
        ) from error


def load_weights(
    model: nn.Module,
    path: Path,
    *,
    group: Group,
    rename: Sequence[str] = (),
    partial: bool = False,
    takes_all: bool = False,
) -> None:
    """Copies the tensors of `path` (a run, a checkpoint, a .safetensors file or a folder of them)
    into the model by name (`rename`: `old=new`); nothing is changed unless all fit. Every rank
    calls it.

    `partial` takes those that fit and logs a table of the others, none of which may be frozen.
    `takes_all` takes what a checkpoint holds of the model beside its weights, too: attributes that
    the run has changed, and extra state.

    Raises: ConfigError if there is none, or a file is damaged; with a table of missing, unexpected
        and differently shaped tensors, if `partial`, when none fits.
    """
    opened = _opened(path, group=group)
    base = ""
    tensors: dict[str, torch.Tensor] = {}
    if opened is not None:
        tensors = _weights_in(opened)
        # Of the frozen weights that a checkpoint of the trainable ones belongs to.
        base = str(opened.values["base_sha256"])
    else:
        for file in _safetensors_files(path):
            tensors |= _read_file(file)
    _rename(tensors, rename, path=path)
    _resolve_ties(tensors, model)
    match = _match(tensors, model, base=base)
    _report(match, model, path=path, partial=partial)
    _copy(tensors, match, model)
    if takes_all and opened is not None:
        put_saved(model, opened.values.get("attributes", {}))
        put_extra(opened, model)


@dataclass(frozen=True)
class _Match:
    """What a file has and what a model wants of it, by name; a row for each name that does not fit,
    and the names that do.
    """

    found: dict[str, Kind]
    wanted: dict[str, Kind]
    unfit: dict[str, str]
    fitting: list[str]


def _rename(tensors: dict[str, torch.Tensor], rename: Sequence[str], *, path: Path) -> None:
    """Gives tensors the model's names. Raises: ConfigError for a name that is not in the file."""
    for pair in rename:
        old, new = pair.split("=")
        if old not in tensors:
            near = nearest(old, tensors)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(f"--rename {old}={new}: {path} has no {old}.{hint}")
        tensors[new] = tensors.pop(old)


def _resolve_ties(tensors: dict[str, torch.Tensor], model: nn.Module) -> None:
    """Keeps a tied tensor under the name by which the model's parameters have it."""
    for alias, name in tied_names(model).items():
        given = tensors.pop(alias, None)
        if name not in tensors and given is not None:
            tensors[name] = given


def _match(tensors: dict[str, torch.Tensor], model: nn.Module, *, base: str) -> _Match:
    """Compares a file with a model. `base` is the hash of the frozen weights that the file leaves
    out: the model may have them already.
    """
    live = _live_tensors(model)
    optional = _may_be_missing(tensors, model, base=base)
    for name, buffer in live.items():
        # One that state dicts leave out need not fit.
        if name in optional and name in tensors and tensors[name].shape != buffer.shape:
            del tensors[name]
    wanted: dict[str, Kind] = {}
    for name, tensor in live.items():
        if name not in optional:
            wanted[name] = (tuple(tensor.shape), tensor.dtype)
    found: dict[str, Kind] = {}
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        # Another width of the same kind of number is rounded when it is copied.
        if name in wanted and _differ_in_width_only(tensor, live[name]):
            dtype = live[name].dtype
        found[name] = (tuple(tensor.shape), dtype)
    unfit = misfits(found, wanted)
    fitting = [name for name in wanted if name not in unfit]
    return _Match(found, wanted, unfit, fitting)


def _live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(sorted([*model.named_parameters(), *model.named_buffers()]))


def _may_be_missing(tensors: dict[str, torch.Tensor], model: nn.Module, *, base: str) -> set[str]:
    """Returns the names that need not be in a file: buffers that are not persistent or only count,
    and frozen weights that are here already.
    """
    saved = model.state_dict()
    live = _live_tensors(model)
    names = set()
    for name in live:
        if name not in saved:
            is_unfit = name not in tensors or tensors[name].shape != live[name].shape
        else:
            is_unfit = name not in tensors and name.endswith("num_batches_tracked")
        if is_unfit:
            names.add(name)
    if base and base == base_sha256(model):
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                names.add(name)
    return names


def _report(match: _Match, model: nn.Module, *, path: Path, partial: bool) -> None:
    """Says what does not fit. Raises: ConfigError where that may not be."""
    frozen = [
        name
        for name, parameter in model.named_parameters()
        if name in match.unfit and not parameter.requires_grad
    ]
    # A frozen tensor that is not loaded would stay random for good.
    if frozen or not partial or not match.fitting:
        hint = ""
        if frozen:
            hint = f"\nFrozen, and so needed from it: {some(frozen)}."
        elif match.fitting and not partial:
            hint = (
                "\nType --init-partial to take what fits and leave the rest at its initial values."
            )
        require_fit(match.found, match.wanted, where=f"--init-from {path}", hint=hint)
    elif match.unfit:
        logger.info(
            "--init-from %s: took %d of the model's %d tensors; not these:\n%s",
            path,
            len(match.fitting),
            len(match.wanted),
            table(match.unfit),
        )


@torch.no_grad()
def _copy(tensors: dict[str, torch.Tensor], match: _Match, model: nn.Module) -> None:
    """Copies what fits, this rank's rows of it where ranks hold rows."""
    live = _live_tensors(model)
    for name in match.fitting:
        place = held(live[name])
        assert isinstance(place, Held)  # DeepSpeed has not split it yet
        given = tensors[name]
        if place.shape:
            given = given[place.start : place.stop]
        place.rows.copy_(given)


def _differ_in_width_only(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are floating-point, or both complex."""
    if one.is_complex() or other.is_complex():
        return one.is_complex() and other.is_complex()
    return one.is_floating_point() and other.is_floating_point()
