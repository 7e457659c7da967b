"""Looking at checkpoints, taking weights out, and starting from them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from lives import alone
from mortal import Net
from paths import KIT
from planted import resealed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy

import ddp_kit
from ddp_kit import evaluate
from ddp_kit.checkpoint.find import best_of
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.cli import ckpt
from ddp_kit.train import main

MORTAL = str(KIT / "mortal.py")
ARGS = [
    "--epochs",
    "2",
    "--width",
    "8",
    "--save-every",
    "6",
    "--eval-every",
    "4",
    "--keep",
    "9",
    "--no-tuning",
    "--lr",
    "1.0",
]


@dataclass(frozen=True)
class Ran:
    """A finished run, and what its checkpoints say."""

    path: Path
    best: int

    @property
    def storage(self) -> LocalDisk:
        return LocalDisk(self.path / "checkpoints")

    def tensors(self, step: int, kind: str) -> dict[str, torch.Tensor]:
        opened = open_checkpoint(self.storage, step, group=alone())
        return {
            name.removeprefix(f"{kind}/"): opened.tensor(name)
            for name in opened.kinds
            if name.startswith(f"{kind}/")
        }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    path = tmp_path_factory.mktemp("ran") / "run"
    assert main([MORTAL, *ARGS, "--run-dir", str(path)]) == 0
    best = best_of(LocalDisk(path / "checkpoints"))
    assert best is not None
    assert 0 < best.step < 20  # else `--best` would show nothing
    return Ran(path, best.step)


@pytest.fixture
def copy(ran: Ran, tmp_path: Path) -> Ran:
    return Ran(Path(shutil.copytree(ran.path, tmp_path / "copy")), ran.best)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a `ckpt` command that must end with a code, and returns what it printed."""

    def call(*args: object, code: int = 0) -> str:
        capsys.readouterr()
        assert ckpt.main([str(arg) for arg in args]) == code
        return capsys.readouterr().out

    return call


def test_ls_says_step_size_ranks_completeness_and_the_best(
    copy: Ran, said: Callable[..., str]
) -> None:
    (copy.path / "checkpoints/step-00000006/rank-0.safetensors").unlink()
    (copy.path / "checkpoints/step-00000012.tmp-abc").mkdir()
    rows = {row.split()[0]: row for row in said("ls", copy.path).splitlines()}
    assert rows["6"].split()[-8:] == [
        "no",
        "rank-0.safetensors",
        "is",
        "missing",
        "or",
        "has",
        "another",
        "size",
    ]
    assert " yes" in rows["20"]
    assert [step for step, row in rows.items() if " best " in row] == [str(copy.best)]
    assert " 1 " in rows["20"]
    assert " MiB " in rows["20"]
    assert (
        f"loss {json.loads((copy.path / 'status.json').read_text())['metrics']['loss']:.4g}"
        in rows["20"]
    )


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-0.safetensors"])
def test_verify_names_the_file_that_differs_and_ends_with_1(
    copy: Ran, said: Callable[..., str], name: str
) -> None:
    assert all(" good " in line for line in said("verify", copy.path).splitlines())
    file = copy.path / "checkpoints/step-00000012" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(bytes(content))
    lines = said("verify", copy.path, code=1).splitlines()
    (wrong,) = [line for line in lines if "DAMAGED" in line]
    assert wrong.startswith("step-00000012 ")
    assert name in wrong
    assert said("verify", copy.path / "checkpoints/step-00000020").count(" good ") == 1
    assert said("verify", file.parent, code=1)
    assert file.read_bytes() == content, "looking changes nothing"


def test_verify_compares_sha256_too_where_a_restore_is_content_with_crc32(
    copy: Ran, said: Callable[..., str]
) -> None:
    manifest = copy.path / "checkpoints/step-00000012/manifest.json"
    files = json.loads(manifest.read_text())["files"]
    files["state.json"][1] = "0" * 64
    manifest.write_bytes(resealed(manifest.read_bytes(), files=files))
    assert open_checkpoint(copy.storage, 12, group=alone()).manifest.step == 12
    assert "state.json does not have the SHA-256" in said("verify", copy.path, code=1)


def test_an_export_of_trainable_weights_alone_leaves_frozen_tied_ones_out(
    tmp_path: Path, said: Callable[..., str]
) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
            self.first.requires_grad_(False)
            self.second.weight = self.first.weight

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(inputs)))

    settings = cases.Settings(run_dir=str(tmp_path / "run"), save_trainable_only=True)
    ddp_kit.run(cases.recipe(settings, model=Tied), settings)
    said("export", tmp_path / "run", "--out", tmp_path / "model.safetensors")
    assert sorted(load_file(tmp_path / "model.safetensors")) == [
        "head.bias",
        "head.weight",
        "second.bias",
    ]


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ([], "model"),
        (["--ema"], "ema"),
        (["--best"], "ema"),
        (["--step", "6"], "model"),
        (["--step", "6", "--ema"], "ema"),
    ],
)
def test_an_export_loads_with_safetensors_alone_and_has_the_weights_asked_for(
    ran: Ran, tmp_path: Path, said: Callable[..., str], flags: list[str], kind: str
) -> None:
    out = tmp_path / "model.safetensors"
    said("export", ran.path, *flags, "--out", out)
    step = 20
    if "--best" in flags:
        step = ran.best
    elif "--step" in flags:
        step = 6
    model = Net(8)
    model.load_state_dict(load_file(out), strict=True)  # the tied layer under both of its names
    expected = ran.tensors(step, "model") | ran.tensors(step, kind)
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    assert named.keys() == expected.keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in expected.items())
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name]


def test_an_export_of_one_checkpoint_and_refusals(
    ran: Ran, tmp_path: Path, said: Callable[..., str]
) -> None:
    from ddp_kit.errors import ConfigError

    out = tmp_path / "model.safetensors"
    said("export", ran.path / "checkpoints/step-00000006", "--out", out)
    before = out.read_bytes()
    for args, words in [
        ((ran.path, "--out", out), "model.safetensors"),
        ((ran.path, "--step", "7", "--out", tmp_path / "new"), "step-00000007|expected a run"),
        ((tmp_path, "--out", tmp_path / "new"), "expected a run"),
    ]:
        with pytest.raises(ConfigError, match=words):
            ckpt.main(["export", *map(str, args)])
    assert out.read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_diff_says_which_tensors_differ_and_by_how_much(
    copy: Ran, ran: Ran, said: Callable[..., str]
) -> None:
    assert " are equal bit for bit, 0 differ" in said("diff", copy.path, ran.path)
    rows = said(
        "diff",
        ran.path / "checkpoints/step-00000012",
        ran.path / "checkpoints/step-00000020",
        code=1,
    ).splitlines()
    a, b = (ran.tensors(step, "model")["first.weight"].double() for step in (12, 20))
    (row,) = [row for row in rows if row.startswith("model/first.weight ")]
    assert f"max |a-b| {float((a - b).abs().max()):.3g}" in row
    assert f"||a-b||/||b|| {float((a - b).norm() / b.norm()):.3g}" in row


def test_looking_passes_over_what_is_damaged_and_leaves_it(
    copy: Ran, tmp_path: Path, said: Callable[..., str]
) -> None:
    (copy.path / "checkpoints/step-00000020/state.json").write_bytes(b"")
    before = sorted(path.name for path in (copy.path / "checkpoints").iterdir())
    assert "step-00000018" in said("export", copy.path, "--out", tmp_path / "model.safetensors")
    assert sorted(path.name for path in (copy.path / "checkpoints").iterdir()) == before


# Starting from weights


def evaluated(path: Path, *flags: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main([MORTAL, "--from", str(path), "--width", "8", *flags]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_evaluation_alone_gives_the_metrics_of_the_run(
    ran: Ran, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (ran.path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "eval"}
    assert evaluated(ran.path, capsys=capsys)["loss"] == pytest.approx(losses[20], rel=1e-6)
    assert evaluated(ran.path, "--best", capsys=capsys)["loss"] == pytest.approx(
        losses[ran.best], rel=1e-6
    )
    assert losses[20] != pytest.approx(losses[ran.best], rel=1e-3)


def first_loss(path: Path, *flags: str) -> float:
    """Returns the first loss of a new run."""
    assert main([MORTAL, *ARGS, "--max-steps", "1", "--run-dir", str(path), *flags]) == 0
    loss: float = json.loads((path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    return loss


def test_a_run_starts_from_the_weights_of_a_run_a_checkpoint_a_file_or_a_folder(
    ran: Ran, tmp_path: Path, said: Callable[..., str]
) -> None:
    out, folder = tmp_path / "weights.safetensors", tmp_path / "folder"
    said("export", ran.path, "--ema", "--out", out)
    tensors = load_file(out)
    folder.mkdir()
    names = sorted(tensors)
    save_file(
        {name: tensors[name] for name in names[:4]}, folder / "model-00001-of-00002.safetensors"
    )
    save_file(
        {name: tensors[name] for name in names[4:]}, folder / "model-00002-of-00002.safetensors"
    )
    paths = [
        ran.path,
        ran.path / "checkpoints",
        ran.path / "checkpoints/step-00000020",
        out,
        folder,
    ]
    losses = [
        first_loss(tmp_path / f"run-{i}", "--init-from", str(path)) for i, path in enumerate(paths)
    ]
    assert len(set(losses)) == 1
    assert losses[0] != first_loss(tmp_path / "fresh")


def test_a_tensor_with_another_name_is_offered_and_taken(
    ran: Ran, tmp_path: Path, said: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "weights.safetensors"
    said("export", ran.path, "--ema", "--out", out)
    loss = first_loss(tmp_path / "whole", "--init-from", str(out))
    tensors = load_file(out)
    save_file(
        {name.replace("last.weight", "head.weight"): tensor for name, tensor in tensors.items()},
        out,
    )
    capsys.readouterr()
    assert (
        main([MORTAL, *ARGS, "--run-dir", str(tmp_path / "refused"), "--init-from", str(out)]) == 2
    )
    assert "type --rename head.weight=last.weight" in capsys.readouterr().err
    assert (
        first_loss(
            tmp_path / "renamed", "--init-from", str(out), "--rename", "head.weight=last.weight"
        )
        == loss
    )


def test_the_exported_weights_are_those_that_were_evaluated(
    ran: Ran, tmp_path: Path, said: Callable[..., str]
) -> None:
    from cases import vectors

    out = tmp_path / "best.safetensors"
    said("export", ran.path, "--best", "--out", out)
    model = Net(8).eval()
    model.load_state_dict(load_file(out))
    inputs, labels = vectors(50).tensors
    best = best_of(ran.storage)
    assert best is not None
    assert cross_entropy(model(inputs), labels).item() == pytest.approx(
        best.metrics["loss"], rel=1e-5
    )
