"""A checkpoint of every format that was released still loads."""

import json
from pathlib import Path

import pytest
from lives import alone
from make_golden import GOLDEN, facts, golden_recipe, settings

from ddp_kit import process_group
from ddp_kit.checkpoint.format.layout import FORMAT
from ddp_kit.checkpoint.format.reader import open_checkpoint
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.state_dict import restore_state
from ddp_kit.setup.build import build
from ddp_kit.stopping.early_stopping import EarlyStopping


def test_every_format_has_a_golden_checkpoint() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        f"format-{number}" for number in range(1, FORMAT + 1)
    }


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_a_golden_checkpoint_gives_back_every_item_of_state(folder: Path) -> None:
    opened = open_checkpoint(LocalDisk(folder), 4, group=alone())
    stopping = EarlyStopping(settings().early_stop)
    with process_group(device="cpu") as group:
        made = build(golden_recipe(), settings(), group)
        restore_state(opened, made.training, early_stopping=stopping)
        assert facts(made.training, stopping) == json.loads((folder / "expected.json").read_text())
    assert opened.manifest.metrics == {"loss": 0.25, "auc": "nan"}
    assert opened.manifest.run_id == opened.values["run_id"] == "golden"
