"""The peak that MFU is taken of."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import Settings, recipe

import ddp_kit
from ddp_kit import Recipe
from ddp_kit.lifecycle import reporters
from ddp_kit.training.peak_flops import peak_flops


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "tf32", 494.5),
        ("NVIDIA L40S", "fp16", 362),
        ("NVIDIA L4", "fp16", 121),
        ("NVIDIA A100-SXM4-80GB", "fp64", 0),
        ("NVIDIA GeForce GTX 1080", "fp32", 0),
    ],
)
def test_a_device_is_known_by_its_name(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision=precision) == tera * 1e12


@pytest.mark.parametrize(
    ("device", "flops", "rate"), [("cuda", 1e12, 4 * 312), ("cuda", 0, 0), ("cpu", 1e12, 0)]
)
def test_a_run_on_known_devices_is_told_the_rate_of_their_peak(
    device: str, flops: float, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    made = Recipe(
        model=torch.nn.Identity, train_data=list, loss=len, optimizer=len, flops_per_sample=flops
    )
    group = SimpleNamespace(device=torch.device(device), world_size=4, rank=0)
    assert reporters.peak_rate(made, Settings(precision="bf16"), group) == rate


def test_train_records_have_the_share_of_the_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporters, "peak_rate", lambda *given: 1e6)
    settings = Settings(global_batch=4, max_steps=2, log_every=1, run_dir=str(tmp_path / "run"))
    ddp_kit.run(recipe(settings), settings)
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert [record["mfu"] for record in records if record["kind"] == "train"] == pytest.approx(
        [record["samples_per_s"] / 1e6 for record in records if record["kind"] == "train"]
    )
