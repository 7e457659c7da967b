"""`RECIPE.py --help`, what is said of a mistyped flag, and the rules that stand with the fields."""

import dataclasses
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from paths import KIT, ROOT

import ddp_kit
from ddp_kit.checkpoint import resume
from ddp_kit.config.command_line import parse
from ddp_kit.config.field_texts import field_texts
from ddp_kit.config.flags import flags_of, names_of
from ddp_kit.config.kinds import in_words
from ddp_kit.config.rules import rule, rules
from ddp_kit.errors import ConfigError
from ddp_kit.train import main

TASKS = [
    "batch",
    "length",
    "reproducibility",
    "precision",
    "strategy",
    "optimization",
    "when a step is bad",
    "evaluation",
    "tracking",
    "saving",
    "stopping",
    "resuming",
    "speed and memory",
]


class Shape(Enum):
    ROUND = 1
    SQUARE = 2


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How weights move."""

    lr: float = 0.1
    """peak learning rate"""


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """A recipe's settings."""

    global_batch: int = 32  # what fits beside the loader
    epochs: int = 2
    """passes over what is left of the data"""
    sizes: tuple[int, ...] = (3, 4)  # neurons of each layer
    # the form of everything
    # that is drawn
    shape: Shape = Shape.ROUND
    augment: bool = True
    where: Path | None = None
    optimizer: Optimizer = field(default_factory=Optimizer)


def sections(text: str) -> dict[str, str]:
    """Returns the help's sections by their heading."""
    found = {}
    for part in text.split("\n\n"):
        head, colon, rest = part.partition(":\n")
        if colon:
            found[head] = rest
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit) as end:
        parse(Settings, ["--help"], prog="train my.py")
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_recipes_own_flags_come_first_and_ours_by_task(said: str) -> None:
    assert said.startswith("usage: train my.py [OPTIONS]\n\nA recipe's settings.\n\n")
    assert list(sections(said)) == ["test_help.py", *TASKS, "general"]
    own = sections(said)["test_help.py"]
    assert own.splitlines() == [
        "  --sizes [INT [INT ...]]",
        "                          neurons of each layer (default: 3 4)",
        "  --shape {ROUND,SQUARE}  the form of everything that is drawn (default: ROUND)",
        "  --augment, --no-augment",
        "                          (default: True)",
        "  --where PATH|{None}     (default: None)",
        "  How weights move.",
        "  --optimizer.lr FLOAT    peak learning rate (default: 0.1)",
    ]


def test_help_tells_type_default_and_words_of_every_flag(said: str) -> None:
    flags = flags_of(Settings, Settings())
    for each in flags:
        assert re.search(rf"^  {re.escape(each.name)}\b", said, re.MULTILINE), each
    assert {each.name for each in flags if not each.text} == {"--augment", "--where"}
    assert {each.name for each in flags if not each.kind and not each.negative} == set()
    text = " ".join(said.split())
    assert "--global-batch INT samples per optimizer step, over all ranks (default: 32)" in text
    assert "--micro-batch INT|{auto} at most so many samples in one forward pass" in text
    assert "--epochs INT passes over what is left of the data (default: 2)" in text
    assert "Stopping early on an evaluation metric. Off while `metric` is empty. --early-" in text
    assert "--init-from STR start from weights only" in text
    assert max(map(len, said.splitlines())) <= 90


def test_help_shows_the_defaults_that_a_settings_file_gives(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.toml").write_text("epochs = 7\n[optimizer]\nlr = 0.25\n")
    with pytest.raises(SystemExit):
        parse(Settings, ["--settings", str(tmp_path / "a.toml"), "-h"], prog="test")
    said = capsys.readouterr().out
    assert "(default: 7)" in said
    assert "(default: 0.25)" in said


@pytest.mark.parametrize("name", ["cifar", "digits", "char_lm"])
def test_the_shipped_recipes_explain_their_flags(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(ROOT / "recipes" / f"{name}.py"), "--help"]) == 0
    own = sections(capsys.readouterr().out)[f"{name}.py"]
    assert "--lr FLOAT" in own
    assert "learning rate" in own


def test_a_class_without_source_has_flags_without_words() -> None:
    made = dataclasses.make_dataclass(
        "Made", [("rate", float, 1.0)], bases=(ddp_kit.Settings,), frozen=True, kw_only=True
    )
    assert "rate" not in field_texts(made)
    assert "--rate" in names_of(made)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "INT"),
        (Literal["a", "b"], "{a,b}"),
        (tuple[int, str], "INT STR"),
        (tuple[Literal["a"], ...], "[{a} [{a} ...]]"),
        (list[float], "[FLOAT [FLOAT ...]]"),
        (int | None, "INT|{None}"),
        (Shape, "{ROUND,SQUARE}"),
    ],
)
def test_types_in_words(hint: object, words: str) -> None:
    assert in_words(hint) == words


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--learning-rat", "3"],
            "--learning-rat is not a flag of this recipe. --help lists all of them.\n",
        ),
        (
            ["--global-bach=3"],
            "--global-bach is not a flag of this recipe. Did you mean --global-batch?"
            " --help lists all of them.\n",
        ),
        (
            ["--lr", "fast", "--epoch", "3"],
            "--epoch is not a flag of this recipe. Did you mean --epochs?"
            " --help lists all of them.\n",
        ),
    ],
)
def test_a_mistyped_flag_is_answered_once_and_by_us(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(KIT / "faulty.py"), *args]) == 2
    assert capsys.readouterr().err == message


def test_a_wrong_value_is_told_without_frames_and_rules() -> None:
    with pytest.raises(ConfigError) as found:
        parse(Settings, ["--optimizer.lr", "fast"], prog="test")
    assert str(found.value).splitlines() == [
        "Value error",
        "Error parsing --optimizer.lr: could not convert string to float: 'fast'",
        "Argument helptext:",
        "--optimizer.lr FLOAT",
        "peak learning rate (default: 0.1)",
        "--help lists every flag with its type and default.",
    ]


def test_every_field_has_a_rule_which_a_recipes_default_keeps() -> None:
    ours = rules(ddp_kit.Settings)
    assert list(ours) == [each.name for each in dataclasses.fields(ddp_kit.Settings)]
    assert set(TASKS) == {each.task for each in ours.values()}
    assert rules(Settings) == ours
    with pytest.raises(ConfigError, match="--global-batch -1: expected 0 or more"):
        parse(Settings, ["--global-batch", "-1"], prog="test")


def test_a_recipe_may_state_rules_of_its_own() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Settings):
        share: float = field(
            default=0.5, metadata=rule("data", least=0, below=1, expected="0 to below 1")
        )

    assert parse(Own, ["--share", "0"], prog="test").share == 0
    for share in ("1", "-0.1", "nan"):
        with pytest.raises(ConfigError, match=r"--share \S+: expected 0 to below 1$"):
            parse(Own, ["--share", share], prog="test")


def test_what_a_later_attempt_may_not_change_is_what_changes_numbers() -> None:
    assert rules(ddp_kit.Settings).keys() - resume.FREE == {
        "global_batch",
        "micro_batch",
        "epochs",
        "max_steps",
        "seed",
        "exact",
        "precision",
        "comm",
        "grad_clip",
        "ema",
        "on_spike",
        "spike_z",
        "spike_window",
        "early_stop",
        "save_trainable_only",
        "activation_checkpointing",
        "sync_batchnorm",
    }
