"""Bad input on two ranks: every rank ends with exit code 1 or 2, it is said once, and nothing is left half-written.

Flags and recipes that are refused before there are ranks: test_flags, test_recipe_loading, test_topology.
"""

import json
import os
import socket
from pathlib import Path

import pytest
from launching import FAULTY, Ended, train, train_on_rank

from ddp_kit.lifecycle import session
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.strategies import precision
from ddp_kit.testing import start_ranks
from ddp_kit.train import main


def in_one_voice(ended: Ended, *, code: int) -> str:
    """Returns what was said, if both ranks ended with `code` and one of them spoke for both."""
    assert ended.codes == [code, code]
    assert ended.is_clean()
    if ended.run_dir.exists():
        assert (ended.status["status"], ended.status["exit_code"], ended.status["step"]) == (
            "failed",
            code,
            0,
        )
    return ended.errors


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--fault", "empty"], 1, "the training data is empty, less than one global batch of 8. Give it samples.\n"),
        (["--fault", "small"], 1, "the training data has 7 samples an epoch, less than one global batch of 8. Type --global-batch 7 or less.\n"),
        (["--fault", "empty evaluation"], 1, "the evaluation data is empty.\n"),
        (["--fault", "no parameters"], 2, "the optimizer (SGD) holds no parameters. Build it from the model it is given"),
        (["--fault", "foreign"], 2, "the optimizer (SGD) holds parameters that are not this model's. Build it from the model it is given"),
        (["--fault", "extra"], 2, "the optimizer (SGD) holds 4 tensors that are not parameters of the model.\n"),
        (["--fault", "part"], 2, "the optimizer (SGD) does not hold 2.bias, which the model would train. Give it all of them, or freeze"),
        (["--fault", "unused"], 2, "idle.weight, idle.bias got no gradient, and the other ranks would wait for it. If the loss leaves"),
        (["--global-batch", "1"], 2, "--global-batch 1 has fewer samples than there are ranks (2). Type --global-batch 2 or more, or start"),
        (["--early-stop.metric", "acuracy"], 2, "--early-stop.metric acuracy: evaluation does not produce it; it produces "),
        (["--fault", "summary", "--early-stop.metric", "auroc"], 2, "--early-stop.metric auroc: evaluation does not produce it; it produces "),
        (["--init-from", "missing.safetensors"], 2, "--init-from missing.safetensors: "),
        (["--precision", "tf32"], 2, "--precision tf32 needs a CUDA device"),
        (["--sync-batchnorm"], 2, "--sync-batchnorm: torch's SyncBatchNorm runs on CUDA only"),
        (["--activation-checkpointing", "Linar"], 2, "--activation-checkpointing Linar: the model has no module of that class. Did you mean Linear?"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_all_ranks_is_said_by_one(
    args: list[str], code: int, message: str, tmp_path: Path
) -> None:
    ended = train(*args, "--max-steps", "30" if "summary" in args else "6", folder=tmp_path)
    if "summary" in args:  # known only after the first evaluation
        assert (ended.codes, ended.status["status"]) == ([code, code], "failed")
        assert ended.errors.startswith(message)
        return
    said = in_one_voice(ended, code=code)
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_labels_out_of_range_name_the_samples(tmp_path: Path) -> None:
    said = in_one_voice(train("--fault", "labels", folder=tmp_path), code=1)
    assert said.count("Traceback") == 1
    assert said.count("IndexError: Target 4 is out of bounds.\n") == 1
    assert said.splitlines()[-1].startswith("in the forward pass before the first step, samples ")


def test_find_unused_parameters_lets_parameters_idle(tmp_path: Path) -> None:
    ended = train("--fault", "unused", "--find-unused-parameters", folder=tmp_path)
    assert (ended.codes, ended.status["status"], ended.errors) == ([0, 0], "finished", "")


def test_ranks_with_different_settings_name_flag_values_and_ranks(tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    ended = train(
        "--lr", "0.1", folder=tmp_path, others={1: [FAULTY, "--lr", "0.2", "--run-dir", run_dir]}
    )
    said = in_one_voice(ended, code=2)
    assert said == (
        "the ranks were started with different settings: --lr is 0.1 on rank 0, 0.2 on rank 1. Start all of them with one command.\n"
    )
    assert not ended.run_dir.exists()


def test_ranks_with_different_texts_of_the_recipe_are_refused(tmp_path: Path) -> None:
    text = Path(FAULTY).read_text()
    copies = [tmp_path / "a" / "faulty.py", tmp_path / "b" / "faulty.py"]
    for copy, addition in zip(copies, ("", "# edited on one node\n"), strict=True):
        copy.parent.mkdir()
        copy.write_text(text + addition)
    commands = {
        rank: [str(copy), "--run-dir", str(tmp_path / "run")] for rank, copy in enumerate(copies)
    }
    ended = train(folder=tmp_path, others=commands, env={"PYTHONPATH": str(Path(FAULTY).parent)})
    assert in_one_voice(ended, code=2).startswith("the ranks read different texts of the recipe")
    assert not ended.run_dir.exists()


@pytest.mark.parametrize("place", ["a file", "under a file", "under /dev"])
def test_a_run_directory_that_cannot_be_written_ends_all_ranks(place: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    path = {"a file": file, "under a file": file / "run", "under /dev": Path("/dev/null/run")}[
        place
    ]
    ended = train("--run-dir", str(path), folder=tmp_path)
    assert ended.codes == [2, 1]
    first, second = ended.errors.splitlines()
    assert first.startswith(f"--run-dir {path}: cannot be written (")
    assert first.endswith("Type another --run-dir.")
    assert second.startswith(
        f"rank 1 on {socket.gethostname()}: ended because rank 0 failed: ConfigError: --run-dir"
    )
    assert file.read_text() == "mine"


def test_a_run_directory_in_use_by_a_live_run_is_left_alone(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    directory.claim()
    directory.status("running", step=7)
    before = {path.name: path.read_bytes() for path in directory.path.iterdir()}
    ended = train(folder=tmp_path)
    assert ended.codes == [2, 1]
    assert ended.errors.startswith(
        f"--run-dir {directory.path}: in use by a live run: host {socket.gethostname()}, pid {os.getpid()}"
    )
    assert {path.name: path.read_bytes() for path in directory.path.iterdir()} == before
    directory.release()


def where_others_speak_soon(args: list[list[str]], errors: str) -> None:
    session.OTHERS_SPEAK_S = 0.1
    train_on_rank(args, errors)


def test_without_a_cuda_device_cuda_is_refused_before_ranks_meet(tmp_path: Path) -> None:
    command = [FAULTY, "--device", "cuda", "--run-dir", str(tmp_path / "run")]
    with start_ranks(
        where_others_speak_soon,
        2,
        [command, command],
        str(tmp_path / "errors"),
        group=False,
        env={"CUDA_VISIBLE_DEVICES": ""},
    ) as ranks:
        assert [report.exit_code for report in ranks.wait()] == [2, 2]
    assert set((tmp_path / "errors").read_text().splitlines()) == {
        "--device cuda: no CUDA device is visible here (torch.cuda.is_available() is False). Type --device cpu, or auto."
    }
    assert not (tmp_path / "run").exists()


def test_half_set_rank_variables_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([FAULTY, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith(
        "the rank variables are half set. Found RANK=0, WORLD_SIZE=2; missing LOCAL_RANK, MASTER_ADDR, MASTER_PORT."
    )
    assert list(tmp_path.iterdir()) == []


def without_fp16(args: list[list[str]], errors: str) -> None:
    precision.has_fp16 = lambda device: False
    train_on_rank(args, errors)


def test_fp16_on_a_cpu_without_it_is_refused(tmp_path: Path) -> None:
    command = [FAULTY, "--precision", "fp16", "--run-dir", str(tmp_path / "run")]
    with start_ranks(
        without_fp16, 2, [command, command], str(tmp_path / "errors"), group=False, deadline_s=10
    ) as ranks:
        assert [report.exit_code for report in ranks.wait()] == [2, 2]
    said = (tmp_path / "errors").read_text()
    assert (
        said
        == "--precision fp16: torch has no float16 kernels for this CPU. Type --precision bf16, or fp32.\n"
    )
    assert not (tmp_path / "run").exists()


def test_a_failed_run_leaves_readable_files_and_says_what_it_was_given(tmp_path: Path) -> None:
    ended = train("--fault", "part", folder=tmp_path)
    assert json.loads((ended.run_dir / "settings.json").read_text())["settings"]["fault"] == "part"
    assert json.loads((ended.run_dir / "env.json").read_text())["topology"]["world_size"] == 2
    assert "does not hold 2.bias" in ended.status["reason"]
    assert "does not hold 2.bias" in (ended.run_dir / "logs" / "rank-0.log").read_text()
