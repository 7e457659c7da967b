"""DeepSpeed's configuration: what flags decide is refused key by key, and a file that cannot be read is named."""

import json
import sys
from pathlib import Path

import pytest

from ddp_kit.distributed.process_group import process_group
from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError, MissingPackageError
from ddp_kit.settings import DeepSpeed
from ddp_kit.strategies.deepspeed.config import DECIDED, config_of


def test_a_configuration_that_contradicts_flags_is_refused_key_by_key(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    given = {
        "train_batch_size": 64,
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "wall_clock_breakdown": True,
    }
    file.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as refused:
        config_of(DeepSpeed(stage=2, config=str(file)))
    lines = str(refused.value).splitlines()
    assert lines[1:] == [
        "  train_batch_size: 64   decided by --global-batch",
        '  fp16: {"enabled": true}   decided by --precision',
        "  zero_optimization.stage: 1   decided by --deepspeed.stage",
    ]
    file.write_text(
        json.dumps({"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True})
    )
    config = config_of(DeepSpeed(stage=2, config=str(file)))
    assert config["wall_clock_breakdown"]
    assert config["zero_optimization"] == {
        "overlap_comm": True,
        "stage": 2,
        "compute_grad_norm": False,
    }
    assert not {"fp16", "bf16", "optimizer", "scheduler"} & set(config)
    assert set(config) - {"wall_clock_breakdown", "zero_optimization"} <= set(DECIDED)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "this is no JSON"), ("[]", "expected a JSON object")],
)
def test_a_configuration_that_cannot_be_read_is_named(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        config_of(DeepSpeed(config=str(file)))
    assert str(file) in str(refused.value)


def test_without_the_package_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddp_kit.strategies.deepspeed.engine import DeepSpeedZero

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with (
        process_group(topology=Topology(), device="cpu") as group,
        pytest.raises(MissingPackageError, match=r"pip install 'ddp_kit\[deepspeed\]'"),
    ):
        DeepSpeedZero(group, DeepSpeed())
