"""The recipes learn, on any number of ranks with the same numbers; the real commands of the README work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shipped
from launching import train
from paths import RECIPES
from safetensors.numpy import load_file

from ddp_kit.cli import main


def losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def folder_of(tmp_path: Path, world_size: int) -> Path:
    (tmp_path / str(world_size)).mkdir()
    return tmp_path / str(world_size)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST and CIFAR-10 in their layouts, with images that a class can be told from."""
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, count in (("train", 6000), ("t10k", 1000)):
        labels = rng.integers(10, size=count).astype(np.uint8)
        images = rng.integers(40, size=(count, 28, 28)).astype(np.uint8)
        for i, label in enumerate(labels):
            images[i, label * 2 : label * 2 + 6, 4:24] += 150
        (root / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        for name, kind, array in (
            ("images-idx3-ubyte", 3, images),
            ("labels-idx1-ubyte", 1, labels),
        ):
            head = b"".join(int(size).to_bytes(4, "big") for size in (0x0800 + kind, *array.shape))
            (root / "MNIST" / "raw" / f"{part}-{name}").write_bytes(head + array.tobytes())
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    for part, count in (("train", 560), ("test", 10)):
        for label, name in enumerate(names):
            folder = root / "cifar10" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, size=(32, 32, 3)).astype(np.uint8)
                pixels[label * 3 : label * 3 + 5] += 120
                Image.fromarray(pixels).save(folder / f"{i:04}.jpg")
    return root


@pytest.mark.parametrize("world_size", [1, 2, 4])
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
    shipped.assert_exact("digits", "--max-steps", "6", "--micro-batch", "16", tmp_path=tmp_path)


@pytest.mark.parametrize(
    "flags", [["--hidden", "32"], ["--optimizer", "adam", "--lr", "0.003", "--activation", "tanh"]]
)
def test_mnist_mlp_learns_the_same_on_two_ranks(
    flags: list[str], small_data: Path, tmp_path: Path
) -> None:
    args = [
        "--data-root",
        str(small_data),
        "--max-steps",
        "15",
        "--log-every",
        "1",
        "--precision",
        "fp64",
        "--dropout",
        "0",
        *flags,
    ]
    runs = []
    for world_size in (1, 2):
        ended = train(
            *args,
            folder=folder_of(tmp_path, world_size),
            recipe=str(RECIPES / "mnist_mlp.py"),
            world_size=world_size,
            limit_s=60,
        )
        assert ended.codes == [0] * world_size, ended.errors
        runs.append(ended)
    one, two = (losses(run.run_dir) for run in runs)
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-9
    assert min(one) < 0.5 * one[0]
    assert "test/accuracy" in runs[0].status["metrics"]


@pytest.mark.parametrize("model", ["lenet", pytest.param("resnet", marks=pytest.mark.slow)])
def test_cifar_learns_the_same_on_two_ranks(model: str, small_data: Path, tmp_path: Path) -> None:
    args = [
        "--data-root",
        str(small_data),
        "--model",
        model,
        "--global-batch",
        "64",
        "--micro-batch",
        "16",
        "--max-steps",
        "4",
        "--per-class",
    ]
    args += ["--precision", "fp64", "--log-every", "1", "--num-workers", "0"]
    runs = []
    for world_size in (1, 2):
        ended = train(
            *args,
            folder=folder_of(tmp_path, world_size),
            recipe=str(RECIPES / "cifar.py"),
            world_size=world_size,
            limit_s=90,
        )
        assert ended.codes == [0] * world_size, ended.errors
        runs.append(losses(ended.run_dir))
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) <= 1e-9


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


def test_a_run_under_torchrun_can_be_shown_evaluated_and_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("digits", "my"):  # recipes become modules of the process that runs them
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    digits = str(RECIPES / "digits.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "-m",
        "ddp_kit.train",
        digits,
    ]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--run-dir", "runs/a", "--max-steps", "60"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks x 32 micro-batch" in done.stdout
    assert "\x1b" not in done.stdout  # a pipe gets no control characters
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
