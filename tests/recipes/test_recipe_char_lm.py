"""char_lm learns, with the same numbers on any number of ranks, whatever the lengths and the architecture."""

import json
from pathlib import Path

import numpy as np
import pytest
import shipped

SMALL = ["--width", "32", "--layers", "1", "--heads", "2", "--length", "16", "--global-batch", "8"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of speeches in which each character but a speech's first follows from the one before: uniform guessing has 3 bits."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    cycle = "abcdefgh" * 8
    speeches = [
        cycle[start : start + length]
        for start, length in rng.integers((0, 9), (8, 40), size=(300, 2)).tolist()
    ]
    (folder / "tinyshakespeare.txt").write_text("\n\n".join(speeches))
    return folder


def flags(root: Path, *more: str) -> list[str]:
    return ["--data-root", str(root), *SMALL, *more]


def test_a_gpt_of_ragged_sequences_learns_the_same_on_two_ranks(root: Path, tmp_path: Path) -> None:
    args = flags(root, "--ragged", "--max-steps", "40", "--lr", "0.01", "--precision", "fp64")
    losses = shipped.assert_same_numbers("char_lm", *args, tmp_path=tmp_path)
    assert losses[-1] < 0.8 < 3 < losses[0]  # nats: an end of a speech cannot be foreseen
    status = json.loads((tmp_path / "ranks-2/run/status.json").read_text())
    assert status["metrics"]["bits_per_character"] == pytest.approx(
        status["metrics"]["loss"] / np.log(2)
    )
    assert status["metrics"]["bits_per_character"] < 1.2
    one = json.loads((tmp_path / "ranks-1/run/status.json").read_text())
    assert one["metrics"]["loss"] == pytest.approx(status["metrics"]["loss"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["bert", "lstm", "gpt"])
@pytest.mark.parametrize("ragged", [["--ragged"], []])
def test_each_architecture_learns_the_same_on_two_ranks(
    architecture: str, ragged: list[str], root: Path, tmp_path: Path
) -> None:
    args = flags(
        root,
        *ragged,
        "--architecture",
        architecture,
        "--max-steps",
        "150",
        "--lr",
        "0.01",
        "--precision",
        "fp64",
    )
    losses = shipped.assert_same_numbers("char_lm", *args, tmp_path=tmp_path)
    assert (
        np.mean(losses[-10:]) < (1.4 if architecture == "bert" else 1) < 3 < losses[0]
    )  # nats; a guess among eight letters has 2.08
    evaluated = [
        json.loads((tmp_path / f"ranks-{size}/run/status.json").read_text())["metrics"]
        for size in (1, 2)
    ]
    assert evaluated[0]["perplexity"] == pytest.approx(evaluated[1]["perplexity"], rel=1e-9)
    assert evaluated[0]["bits_per_character"] < 2.3  # of 3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt", "bert", "lstm"])
def test_a_killed_run_goes_on_bit_for_bit(architecture: str, root: Path, tmp_path: Path) -> None:
    args = flags(
        root, "--ragged", "--architecture", architecture, "--max-steps", "12", "--save-every", "3"
    )
    shipped.assert_goes_on_bit_for_bit("char_lm", *args, tmp_path=tmp_path, deaths="7:1")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt", "bert", "lstm"])
def test_exact_is_bitwise_on_one_two_and_four_ranks(
    architecture: str, root: Path, tmp_path: Path
) -> None:
    args = flags(
        root, "--ragged", "--architecture", architecture, "--max-steps", "6", "--micro-batch", "2"
    )
    shipped.assert_exact("char_lm", *args, tmp_path=tmp_path)


@pytest.mark.slow
def test_a_missing_text_says_where_it_looked_and_what_to_type(tmp_path: Path) -> None:
    ended = shipped.ran("char_lm", "--data-root", str(tmp_path / "none"), folder=tmp_path / "run")
    assert ended.codes == [1]
    assert str(tmp_path / "none") in ended.errors
    assert "--data-root" in ended.errors
