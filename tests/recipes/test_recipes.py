"""The recipes learn, on any number of ranks with the same numbers; the commands that follow a run work."""

import json
import sys
from pathlib import Path

import pytest
import shipped
from launching import train
from paths import RECIPES
from safetensors.numpy import load_file
from small_cifar import HELD_OUT
from small_mnist import write_small_mnist

from ddp_kit.cli import main

SLOW = [pytest.mark.slow, pytest.mark.steady]


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_mnist(tmp_path_factory.mktemp("data"), train=HELD_OUT + 15 * 128)


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(1, marks=SLOW), pytest.param(4, marks=SLOW)]
)
def test_digits_reach_97_percent(world_size: int, tmp_path: Path) -> None:
    ended = train(
        folder=tmp_path, recipe=str(RECIPES / "digits.py"), world_size=world_size, limit_s=60
    )
    assert ended.codes == [0] * world_size, ended.errors
    assert ended.status["metrics"]["accuracy"] >= 0.97
    assert ended.is_clean()


def test_digits_give_the_same_numbers_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    shipped.assert_same_numbers(
        "digits", "--max-steps", "12", "--precision", "fp64", tmp_path=tmp_path
    )
    shipped.assert_goes_on_bit_for_bit(
        "digits", "--max-steps", "12", "--save-every", "3", tmp_path=tmp_path, deaths="7:1"
    )
    shipped.assert_exact(
        "digits", "--max-steps", "6", "--micro-batch", "16", tmp_path=tmp_path, worlds=(1, 4)
    )


@pytest.mark.usefixtures("few_are_held_out")
@pytest.mark.parametrize(
    "flags", [["--hidden", "32"], ["--optimizer", "adam", "--lr", "0.003", "--activation", "tanh"]]
)
def test_mnist_mlp_learns_the_same_on_two_ranks(
    flags: list[str], mnist_root: Path, tmp_path: Path
) -> None:
    args = ["--data-root", str(mnist_root), "--max-steps", "15", "--precision", "fp64", *flags]
    losses = shipped.assert_same_numbers("mnist_mlp", *args, "--dropout", "0", tmp_path=tmp_path)
    assert min(losses) < 0.5 * losses[0]
    status = json.loads((tmp_path / "ranks-1/run/status.json").read_text())
    assert "test/accuracy" in status["metrics"]


@pytest.mark.usefixtures("few_are_held_out")
@pytest.mark.parametrize("model", ["lenet", pytest.param("resnet", marks=SLOW)])
def test_cifar_learns_the_same_on_two_ranks(model: str, cifar_root: Path, tmp_path: Path) -> None:
    args = ["--data-root", str(cifar_root), "--model", model, "--per-class", "--num-workers", "0"]
    args += ["--global-batch", "64", "--micro-batch", "16", "--max-steps", "4"]
    shipped.assert_same_numbers("cifar", *args, "--precision", "fp64", tmp_path=tmp_path)


def test_missing_data_says_where_it_looked_and_what_to_type(tmp_path: Path) -> None:
    ended = train(
        "--data-root",
        str(tmp_path / "none"),
        folder=tmp_path,
        recipe=str(RECIPES / "cifar.py"),
        world_size=2,
    )
    assert all(code in (1, 2) for code in ended.codes)
    assert str(tmp_path / "none") in ended.errors
    assert "--data-root" in ended.errors
    assert ended.is_clean()


def test_a_run_can_be_shown_evaluated_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("digits", "my"):  # recipes become modules of the process that runs them
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    digits = str(RECIPES / "digits.py")
    ended = train(
        "--run-dir", "runs/a", "--max-steps", "60", folder=tmp_path, recipe=digits, limit_s=60
    )
    assert ended.codes == [0, 0], ended.errors
    (tmp_path / "errors").unlink()
    assert "2 ranks x 32 micro-batch" in ended.outputs[0]
    assert "\x1b" not in ended.outputs[0]  # a file gets no control characters
    status = json.loads(Path("runs/a/status.json").read_text())

    def said(*args: str) -> str:
        assert main.main(args) == 0
        return capsys.readouterr().out

    said("ckpt", "export", "runs/a", "--out", "model.safetensors")
    assert load_file("model.safetensors")
    evaluated = json.loads(
        said("evaluate", digits, "--init-from", "model.safetensors").splitlines()[-1]
    )
    assert evaluated["accuracy"] == pytest.approx(status["metrics"]["accuracy"])
    assert "finished" in said("show", "runs/a")
    said("new", "my.py", "--from", "digits")
    assert "It runs. Nothing was written." in said("check", "my.py")
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {
        "model.safetensors",
        "my.py",
        "runs",
    }
    assert [path.name for path in Path("runs").iterdir()] == ["a"]


@pytest.mark.ranks(2)
def test_the_loop_of_ones_own_reaches_95_percent(group, tmp_path) -> None:
    import contextlib
    import io
    import runpy
    from unittest.mock import patch

    import ddp_kit

    printed = io.StringIO()
    with (
        patch.object(ddp_kit, "process_group", lambda: contextlib.nullcontext(group)),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(RECIPES / "own_loop.py"))["main"](steps=200, folder=str(tmp_path))
    if group.rank == 0:
        assert float(printed.getvalue().split()[-1]) >= 0.95
