"""From the command line to Settings: tyro reads the flags, this module words the refusals.

Owns: `--settings FILE`, the peers' names, and printing help once though every rank parses.
Refuses: guessing what was meant. An unknown flag is refused with the nearest valid one before any process group starts.
"""

import contextlib
import dataclasses
import io
import json
import sys
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ddp_kit.config.validation import check, without_strategy
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.io.logs import REDACTED
from ddp_kit.settings import Settings, converted, fits, flag

AnySettings = TypeVar("AnySettings", bound=Settings)

PEERS = {  # the flags of Accelerate's examples, Lightning, Hugging Face's Trainer and DeepSpeed, in our words
    "--batch-size": "--global-batch (samples per optimizer step over all ranks) or --micro-batch (samples of one forward pass)",
    "--per-device-train-batch-size": "--global-batch (samples per optimizer step over all ranks) or --micro-batch (one forward pass)",
    "--gradient-accumulation-steps": "--micro-batch: accumulation follows from global_batch, micro_batch and the number of ranks",
    "--accumulate-grad-batches": "--micro-batch: accumulation follows from global_batch, micro_batch and the number of ranks",
    "--learning-rate": "--lr (where the recipe has it)",
    "--mixed-precision": "--precision bf16",
    "--max-grad-norm": "--grad-clip",
    "--gradient-clip-val": "--grad-clip",
    "--num-train-epochs": "--epochs",
    "--max-epochs": "--epochs",
    "--output-dir": "--run-dir",
    "--default-root-dir": "--run-dir",
    "--resume-from-checkpoint": "--init-from for weights only",
    "--devices": "the launcher's number of processes: torchrun --nproc_per_node=N",
    "--num-processes": "the launcher's number of processes: torchrun --nproc_per_node=N",
    "--dataloader-num-workers": "--num-workers",
    "--max-time": "--max-hours",
}


def parse(cls: type[AnySettings], args: Sequence[str], *, prog: str, rank: int = 0) -> AnySettings:
    """Returns the settings that defaults, `--settings FILE` and flags give, flags winning. Needs no process group.

    Raises: ConfigError with what was given, expected and to type. SystemExit after `--help`, which rank 0 prints.
    """
    files, rest = _take_settings_files(list(args))
    default = cls()
    for file in files:
        default = _replace(default, read_settings_file(Path(file)), where=file)
    _refuse_peers(cls, rest)
    settings = _tyro(cls, rest, default=default, prog=prog, prints_help=rank == 0)
    check(settings)
    chosen: object = getattr(settings, "strategy", "")
    for name in ("fsdp", "deepspeed"):
        if chosen != name and any(
            arg.startswith(f"--{name}.") for arg in rest
        ):  # with its default, which `check` cannot see
            raise ConfigError(without_strategy(name))
    return settings


def _take_settings_files(args: list[str]) -> tuple[list[str], list[str]]:
    files, rest = [], []
    at = iter(args)
    for arg in at:
        if arg == "--settings":
            file = next(at, None)
            if file is None:
                raise ConfigError("--settings expects a TOML or JSON file.")
            files.append(file)
        elif arg.startswith("--settings="):
            files.append(arg.partition("=")[2])
        else:
            rest.append(arg)
    return files, rest


def read_settings_file(path: Path) -> dict[str, Any]:
    """Reads a TOML or JSON file of settings, also a run's own settings.json.

    Raises: ConfigError if it is missing or cannot be read.
    """
    try:
        text = path.read_text()
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise ConfigError(f"--settings {path}: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"--settings {path}: neither TOML nor JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--settings {path}: expected a table of fields.")
    inner = values.get("settings")
    return inner if isinstance(inner, dict) else values


def _replace(settings: Any, values: dict[str, Any], *, where: str, prefix: str = "") -> Any:
    """Returns a dataclass with some fields replaced by a file's values, checked by name and kind."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changes: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in fields:
            near = nearest(key, fields)
            raise ConfigError(
                f"--settings {where}: unknown field {prefix}{name}.{f' Did you mean {prefix}{near}?' if near else ''}"
            )
        old = fields[key]
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"--settings {where}: {prefix}{name} = {value!r}: expected a table."
                )
            changes[key] = _replace(old, value, where=where, prefix=f"{prefix}{name}.")
        else:
            changes[key] = _as_field(
                type(settings), key, value, where=f"--settings {where}: {prefix}{name}"
            )
    return dataclasses.replace(settings, **changes)


def _as_field(cls: type, name: str, value: Any, *, where: str) -> Any:
    """Returns a TOML or JSON value as the field's type has it. Raises: ConfigError if it does not fit, or was redacted."""
    hint = typing.get_type_hints(cls)[name]
    if value == REDACTED:
        raise ConfigError(
            f"{where} was redacted when it was written. Remove it there and type {flag(name)} with the value."
        )
    if fits(value, hint):
        return converted(value, hint)
    raise ConfigError(
        f"{where} = {value!r}: expected {getattr(hint, '__name__', None) if isinstance(hint, type) else hint}."
    )


def _refuse_peers(cls: type[Settings], args: Sequence[str]) -> None:
    own = {flag(field.name) for field in dataclasses.fields(cls)}
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if name in PEERS and name not in own:
            raise ConfigError(f"{name} is not a flag here. Type {PEERS[name]}.")


def _tyro(
    cls: type[AnySettings],
    args: Sequence[str],
    *,
    default: AnySettings,
    prog: str,
    prints_help: bool,
) -> AnySettings:
    import tyro  # 0.3 s: only where flags are read

    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            return tyro.cli(
                cls, args=list(args), default=default, prog=prog, description=cls.__doc__ or ""
            )
    except SystemExit as end:
        if end.code in (0, None):
            if prints_help:
                sys.stdout.write(out.getvalue())
            raise
        raise ConfigError(
            f"{_plain(err.getvalue() or out.getvalue())}{_suggest(cls, args)}"
        ) from None


def _plain(box: str) -> str:
    """Returns tyro's framed message as plain lines."""
    lines = [line.strip("│╭╰─╮╯ ").strip() for line in box.splitlines()]
    kept = [line for line in lines if line and not line.startswith("For full helptext")]
    return "\n".join(kept)


def _suggest(cls: type[Settings], args: Sequence[str]) -> str:
    names = _flags(cls)
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if arg.startswith("--") and name not in names:
            near = nearest(name, names)
            return f"\n{name} is not a flag of this recipe.{f' Did you mean {near}?' if near else ''} --help lists all of them."
    return "\n--help lists every flag with its type and default."


def _flags(cls: type) -> set[str]:
    names = {"--help", "--settings"}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            names |= {f"{flag(name)}.{inner[2:]}" for inner in _flags(hint)}
        else:
            names |= {flag(name)} | ({f"--no-{flag(name)[2:]}"} if hint is bool else set())
    return names
