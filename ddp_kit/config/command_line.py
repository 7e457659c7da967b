"""From the command line to Settings: tyro reads the flags, this module words the refusals.

Nothing is guessed: an unknown flag is refused with the nearest valid one, before any process group
starts. Every rank parses, and help is printed once.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ddp_kit.config.flags import names_of
from ddp_kit.config.help_text import help_text
from ddp_kit.config.rules import rules
from ddp_kit.config.settings_file import read_settings_file, with_values
from ddp_kit.config.validation import check, without_strategy
from ddp_kit.errors import ConfigError, nearest
from ddp_kit.settings import Settings, flag

AnySettings = TypeVar("AnySettings", bound=Settings)

_PER_STEP = "--global-batch (samples per optimizer step over all ranks)"
_ACCUMULATION = (
    "--micro-batch: accumulation follows from global_batch, micro_batch and the number of ranks"
)
_PROCESSES = "the launcher's number of processes: torchrun --nproc_per_node=N"
# Flags of Accelerate's examples, Lightning, Hugging Face's Trainer and DeepSpeed that are not just
# another name of one of ours: those stand with the fields.
_ANSWERS = {
    "--batch-size": f"{_PER_STEP} or --micro-batch (samples of one forward pass)",
    "--per-device-train-batch-size": f"{_PER_STEP} or --micro-batch (one forward pass)",
    "--gradient-accumulation-steps": _ACCUMULATION,
    "--accumulate-grad-batches": _ACCUMULATION,
    "--learning-rate": "--lr (where the recipe has it)",
    "--mixed-precision": "--precision bf16",
    "--resume-from-checkpoint": "--init-from for weights only",
    "--devices": _PROCESSES,
    "--num-processes": _PROCESSES,
}


def _peers() -> dict[str, str]:
    found = dict(_ANSWERS)
    for name, rule in rules(Settings).items():
        for peer in rule.elsewhere:
            found[peer] = flag(name)
    return found


PEERS = _peers()  # other frameworks' flags, with what to type here


def parse(cls: type[AnySettings], args: Sequence[str], *, prog: str, rank: int = 0) -> AnySettings:
    """Returns the settings that defaults, `--settings FILE` and flags give, flags winning.

    Needs no process group.

    Args: `prog` the command as usage shows it.
    Raises: ConfigError with what was given, expected and to type. SystemExit after `--help`, which
        rank 0 prints.
    """
    files, rest = _take_settings_files(list(args))
    default = cls()
    for file in files:
        default = with_values(default, read_settings_file(Path(file)), where=file)
    _refuse_peers(cls, rest)
    if {"-h", "--help"}.intersection(rest):
        if rank == 0:
            sys.stdout.write(help_text(cls, default, prog=prog))
        raise SystemExit(0)
    settings = _read_flags(cls, rest, default=default, prog=prog)
    check(settings)
    _refuse_other_strategies(settings, rest)
    return settings


def _take_settings_files(args: list[str]) -> tuple[list[str], list[str]]:
    """Returns the files of `--settings`, and the other arguments."""
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg == "--settings":
            file = next(remaining, None)
            if file is None:
                raise ConfigError("--settings expects a TOML or JSON file.")
            files.append(file)
        elif arg.startswith("--settings="):
            files.append(arg.partition("=")[2])
        else:
            rest.append(arg)
    return files, rest


def _refuse_peers(cls: type[Settings], args: Sequence[str]) -> None:
    own = {flag(name) for name in cls.__dataclass_fields__}
    for arg in args:
        name = _name_in(arg)
        if name in PEERS and name not in own:
            raise ConfigError(f"{name} is not a flag here. Type {PEERS[name]}.")


def _refuse_other_strategies(settings: Settings, args: Sequence[str]) -> None:
    """Refuses a strategy's own flags beside another strategy, also with their defaults.

    `check` looks at values, and cannot see that a default was typed.
    """
    for name in ("fsdp", "deepspeed"):
        is_typed = any(arg.startswith(f"--{name}.") for arg in args)
        if is_typed and settings.strategy != name:
            raise ConfigError(without_strategy(name))


def _name_in(arg: str) -> str:
    """Returns the flag in an argument, `--lr` in `--lr=3`, with dashes as we write it."""
    return arg.partition("=")[0].replace("_", "-")


def _read_flags(
    cls: type[AnySettings], args: Sequence[str], *, default: AnySettings, prog: str
) -> AnySettings:
    import tyro  # 0.3 s: only where flags are read

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return tyro.cli(cls, args=list(args), default=default, prog=prog)
    except SystemExit as end:
        if end.code in (0, None):  # a shell's completion was asked for
            sys.stdout.write(said.getvalue())
            raise
    raise ConfigError(_unknown_flag(cls, args) or _in_plain_lines(said.getvalue()))


def _unknown_flag(cls: type[Settings], args: Sequence[str]) -> str:
    """Returns what to say of the first argument that looks like a flag and is none, or ""."""
    names = names_of(cls)
    for arg in args:
        name = _name_in(arg)
        if arg.startswith("--") and name not in names:
            near = nearest(name, names)
            hint = f" Did you mean {near}?" if near else ""
            return f"{name} is not a flag of this recipe.{hint} --help lists all of them."
    return ""


def _in_plain_lines(framed: str) -> str:
    """Returns tyro's message without its frame and rules, and where to read on."""
    lines = []
    for line in framed.splitlines():
        text = line.strip("│╭╰─╮╯ ")
        is_rule = re.fullmatch("[-─]+", text)
        if text and not is_rule and not text.startswith("For full helptext"):
            lines.append(text)
    return "\n".join([*lines, "--help lists every flag with its type and default."])
