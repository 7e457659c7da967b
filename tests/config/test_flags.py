"""From the command line to Settings: what is accepted, what is refused and in which words, and that it is said once."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import KIT, ROOT

import ddp_kit
from ddp_kit.config.command_line import PEERS, parse
from ddp_kit.config.flags import names_of
from ddp_kit.errors import ConfigError
from ddp_kit.lifecycle import session
from ddp_kit.settings import EarlyStop, Wandb, to_json
from ddp_kit.train import main

FAULTY = str(KIT / "faulty.py")


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """A recipe's settings."""

    global_batch: int = 32
    epochs: int = 2
    lr: float = 0.1
    """peak learning rate"""
    sizes: tuple[int, ...] = (3, 4)
    augment: bool = True


def read(*args: str) -> Settings:
    return parse(Settings, args, prog="test")


def test_every_field_is_a_flag_in_either_spelling() -> None:
    given = read(
        "--global-batch",
        "64",
        "--lr=0.5",
        "--early_stop.patience",
        "3",
        "--early-stop.metric",
        "loss",
        "--precision",
        "bf16",
    )
    assert given == Settings(
        global_batch=64, lr=0.5, early_stop=EarlyStop(patience=3, metric="loss"), precision="bf16"
    )
    assert read("--sizes", "5", "6", "7", "--tracker", "wandb", "--wandb.tags", "a", "b").sizes == (
        5,
        6,
        7,
    )
    assert read("--micro-batch", "auto").micro_batch == "auto"
    assert read("--micro-batch", "16").micro_batch == 16


def test_booleans_are_a_pair_of_flags() -> None:
    assert read("--compile", "--no-augment", "--no-tuning") == Settings(
        compile=True, augment=False, tuning=False
    )
    assert read("--no-compile", "--augment") == Settings()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--global-bach", "3"],
            "--global-bach is not a flag of this recipe. Did you mean --global-batch?",
        ),
        (
            ["--early-stop.patince", "3"],
            "--early-stop.patince is not a flag of this recipe. Did you mean --early-stop.patience?",
        ),
        (["--learning_rat=3"], "--learning-rat is not a flag of this recipe."),
        (["--zzz"], "--zzz is not a flag of this recipe. --help lists all of them."),
        (["stray"], "Unrecognized options: stray"),
        (["--lr", "fast"], "Error parsing --lr: could not convert string to float: 'fast'"),
        (["--epochs", "1.5"], "--epochs"),
        (["--epochs"], "Missing value for argument '--epochs'"),
        (["--compile", "yes"], "Unrecognized options: yes"),
        (["--precision", "fp17"], "invalid choice 'fp17' for argument '--precision'"),
        (["--early-stop.mode", "best"], "invalid choice 'best'"),
        (["--tracker", "mlflow"], "--tracker"),
        (["--device", "tpu"], "invalid choice 'tpu' for argument '--device'"),
    ],
)
def test_an_unknown_flag_or_value_is_refused_in_plain_words(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as found:
        read(*args)
    assert message in str(found.value)
    assert not set("│╭╰╮╯") & set(str(found.value))  # no frames in a log file


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (
            ["--global-batch", "0"],
            ["--global-batch 0: expected at least 1 sample per optimizer step"],
        ),
        (["--global-batch", "-8"], ["--global-batch -8: expected 0 or more"]),
        (
            ["--micro-batch", "-1"],
            ["--micro-batch -1: expected at least 1 sample, or 0 for a rank's whole share"],
        ),
        (["--epochs", "-1"], ["--epochs -1: expected 0 or more"]),
        (
            ["--epochs", "0"],
            [
                "neither epochs nor max_steps is set, so the run has no end: type --epochs N or --max-steps N"
            ],
        ),
        (["--log-every", "0"], ["--log-every 0: expected at least 1 step"]),
        (
            ["--num-workers", "-1", "--threads", "-2"],
            ["--num-workers -1: expected 0", "--threads -2: expected 0"],
        ),
        (["--ema", "1"], ["--ema 1.0: expected a decay from 0 (off) to below 1"]),
        (["--grad-clip", "nan"], ["--grad-clip nan: expected"]),
        (["--seed", "-1"], ["--seed -1: expected 0 to 2^63 - 1"]),
        (["--early-stop.patience", "9"], ["--early-stop.* is set without --early-stop.metric"]),
        (["--spike-z", "9"], ["--spike-z is set without --on-spike"]),
        (["--max-dropped", "3"], ["--max-dropped is set where no step is dropped"]),
        (["--max-dropped", "0"], ["--max-dropped 0: expected at least 1 step"]),
        (
            ["--sdc-check", "9", "--strategy", "fsdp"],
            ["--strategy fsdp with --sdc-check: a rank has no whole model"],
        ),
        (
            ["--early-stop.metric", "loss", "--early-stop.patience", "0"],
            ["--early-stop.patience 0"],
        ),
        (["--wandb.project", "p"], ["--wandb.* is set without --tracker wandb"]),
        (["--eval-every", "-5", "--ema", "2"], ["--eval-every -5", "--ema 2.0"]),
    ],
)
def test_impossible_values_are_refused_all_at_once(args: list[str], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        read(*args)
    assert all(message in str(found.value) for message in messages), str(found.value)


@pytest.mark.parametrize("peer", sorted(PEERS))
def test_the_peers_names_are_answered_with_ours(peer: str) -> None:
    for spelling in (
        [peer, "8"],
        [f"{peer}=8"],
        [peer.replace("-", "_").replace("__", "--", 1), "8"],
    ):
        with pytest.raises(ConfigError, match=rf"{peer} is not a flag here. Type ") as found:
            read(*spelling)
        named = {
            word.rstrip(":.")
            for word in str(found.value).split()
            if word.startswith("--") and "nproc" not in word
        } - {peer}
        assert named <= names_of(Settings)


@pytest.mark.parametrize("arg", ["--deepspeed.stage=2", "--fsdp.wrap-size=0"])
def test_a_strategys_own_flag_without_it_is_refused_though_it_has_its_default(arg: str) -> None:
    name = arg[2:].partition(".")[0]
    with pytest.raises(ConfigError, match=rf"--{name}\.\* is set without --strategy {name}"):
        parse(Settings, [arg], prog="test")


def test_a_recipe_may_use_a_peers_name_for_itself() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Own(Settings):
        learning_rate: float = 0.3

    assert parse(Own, ["--learning-rate", "0.7"], prog="test").learning_rate == 0.7


TOML = 'lr = 1\nsizes = [1, 2]\ncompile = true\nmicro-batch = "auto"\n[early_stop]\nmetric = "loss"\npatience = 2\n'
FROM_TOML = Settings(
    lr=1.0,
    sizes=(1, 2),
    compile=True,
    micro_batch="auto",
    early_stop=EarlyStop(metric="loss", patience=2),
)


def test_a_settings_file_sets_fields_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(TOML)
    assert read("--settings", str(file)) == FROM_TOML
    assert isinstance(read("--settings", str(file)).lr, float)
    assert read(
        "--lr", "3", f"--settings={file}", "--early-stop.patience", "7", "--no-compile"
    ) == dataclasses.replace(
        FROM_TOML, lr=3.0, early_stop=EarlyStop(metric="loss", patience=7), compile=False
    )
    other = tmp_path / "b.json"
    other.write_text('{"lr": 5, "epochs": 9}')
    assert read("--settings", str(file), "--settings", str(other)) == dataclasses.replace(
        FROM_TOML, lr=5.0, epochs=9
    )


def test_a_runs_own_settings_json_reproduces_its_settings(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        FROM_TOML, tracker=("wandb",), wandb=Wandb(tags=("a", "b"), mode="offline")
    )
    file = tmp_path / "settings.json"
    file.write_text(
        json.dumps({"recipe": "my.py", "recipe_sha256": "0", "settings": to_json(settings)})
    )
    assert read("--settings", str(file)) == settings


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.toml", None, "missing.toml: No such file or directory"),
        ("torn.json", '{"lr": ', "neither TOML nor JSON"),
        ("torn.toml", "lr = = 3", "neither TOML nor JSON"),
        ("list.json", "[1, 2]", "expected a table of fields"),
        ("a.toml", "learnin_rate = 3", r"a.toml: unknown field learnin_rate\.$"),
        ("a.toml", "global-bach = 3", "unknown field global-bach. Did you mean global_batch?"),
        (
            "a.toml",
            "[early_stop]\npatince = 3",
            "unknown field early_stop.patince. Did you mean early_stop.patience?",
        ),
        ("a.toml", "early_stop = 3", "early_stop = 3: expected a table"),
        ("a.toml", "epochs = 1.5", "epochs = 1.5: expected int"),
        ("a.toml", "epochs = true", "epochs = True: expected int"),
        ("a.toml", "lr = 'fast'", "lr = 'fast': expected float"),
        ("a.toml", "compile = 1", "compile = 1: expected bool"),
        ("a.toml", "sizes = [1, 'two']", r"sizes = \[1, 'two'\]: expected"),
        ("a.toml", "precision = 'fp17'", "precision = 'fp17': expected"),
        ("a.toml", "micro_batch = 'large'", "micro_batch = 'large': expected"),
        ("a.toml", "global_batch = 0", "--global-batch 0: expected at least 1 sample"),
    ],
)
def test_a_wrong_settings_file_is_refused(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        read("--settings", str(tmp_path / name))


def test_settings_without_a_file_is_refused() -> None:
    with pytest.raises(ConfigError, match="--settings expects a TOML or JSON file"):
        read("--lr", "1", "--settings")


@pytest.mark.parametrize(("rank", "prints"), [(0, True), (1, False)])
def test_help_lists_flag_type_default_and_words_on_rank_0_only(
    rank: int, prints: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Settings, ["--help"], prog="test", rank=rank)
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code in (0, None)
    assert (
        all(
            part in text
            for part in (
                "--lr FLOAT",
                "peak learning rate (default: 0.1)",
                "--early-stop.patience INT",
            )
        )
        == prints
    )
    assert bool(text) == prints


def test_other_ranks_than_the_first_are_refused_some_seconds_later(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By then the launcher has ended them if the first was refused as well."""
    waits: list[float] = []
    monkeypatch.setattr(session.time, "sleep", waits.append)
    for rank in ("0", "1"):
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "1",
        }.items():
            monkeypatch.setenv(name, value)
        assert main([FAULTY, "--lr", "fast"]) == 2
        assert "--lr" in capsys.readouterr().err
        assert waits == [session.OTHERS_SPEAK_S] * int(rank)


@pytest.mark.parametrize(
    ("args", "code", "count"),
    [
        pytest.param(["--help"], 0, 1, marks=[pytest.mark.slow, pytest.mark.steady]),
        (["--lr", "fast"], 1, 1),
    ],
)
def test_under_torchrun_it_is_said_once(
    args: list[str], code: int, count: int, tmp_path: Path
) -> None:
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "ddp_kit.train",
        FAULTY,
        *args,
    ]
    run = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == code  # torchrun flattens a rank's 2 to 1
    said = run.stdout if code == 0 else run.stderr
    assert said.count("--early-stop.patience INT" if code == 0 else "Error parsing --lr") == count
    assert list(tmp_path.iterdir()) == []


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
