"""Writes the golden checkpoint of the current format: `python tests/make_golden.py`, once for each format that is released.

Every later ddp_kit must read it: `test_checkpoint_golden.py`. It is written by two ranks after four steps of a small run.
"""

import json
import math
from typing import Any

import torch
from cases import Settings, normed, recipe
from paths import KIT
from stored import write

from ddp_kit import Recipe, process_group, schedules
from ddp_kit.checkpoint.format.layout import FORMAT
from ddp_kit.checkpoint.format.storage import LocalDisk
from ddp_kit.checkpoint.state_dict import state_of
from ddp_kit.checkpoint.weights import weights_sha256
from ddp_kit.setup.build import build
from ddp_kit.stopping.early_stopping import EarlyStopping
from ddp_kit.training.state import Training
from ddp_kit.training.step import train_step

GOLDEN = KIT / "golden"
STEPS = 4


def settings() -> Settings:
    return Settings(precision="fp32", ema=0.9, max_steps=8, micro_batch=12)


def golden_recipe() -> Recipe:
    return recipe(
        settings(),
        model=normed,
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
    )


def total(tensor: torch.Tensor) -> float:
    """The exact sum, the same on any machine."""
    return math.fsum(tensor.reshape(-1).tolist())


def facts(training: Training, stopping: EarlyStopping) -> dict[str, Any]:
    """Returns what a restored run must show, as JSON."""
    (objective,) = training.objectives
    moments = [value for state in objective.optimizer.state.values() for value in state.values()]
    assert training.average is not None
    return {
        "weights_sha256": weights_sha256(training.model),
        "step": training.step,
        "lr": objective.optimizer.param_groups[0]["lr"],
        "moments": [total(moment) for moment in moments],
        "averages": [total(average) for average in training.average.averages],
        "schedule": objective.scheduler.last_epoch,
        "stopping": [stopping.best, stopping.best_step, stopping.stale],
    }


def main() -> None:
    folder = GOLDEN / f"format-{FORMAT}"
    with process_group(device="cpu") as group:
        made = build(golden_recipe(), settings(), group)
        for batch in made.feed.batches(start=0, end=STEPS):
            train_step(made.training, batch)
        made.training.control_packet.close()
        stopping = EarlyStopping(settings().early_stop)
        stopping.best, stopping.best_step, stopping.stale = 0.25, 2, 1
        state = state_of(
            made.training,
            early_stopping=stopping,
            more={"settings": {"lr": "0.1"}, "run_id": "golden", "best": "0.25"},
        )
        metrics = {"loss": 0.25, "auc": "nan"}
        write(
            LocalDisk(folder),
            STEPS,
            tensors=state.tensors,
            values=state.values,
            run_id="golden",
            metrics=metrics,
            best_by="min loss",
        )
        (folder / "expected.json").write_text(
            json.dumps(facts(made.training, stopping), indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
