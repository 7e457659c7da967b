"""recipes/ported/detection.py has the curves of a bare loop, whose losses are divided by the boxes of the whole batch."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from ddp_kit.distributed.process_group import Group

# Steps of 8 images in micro-batches of 3, 3 and 2, or 3 and 1 on each of two ranks: boxes fall unevenly.
SMALL = {"global_batch": 8, "micro_batch": 3, "width": 4, "epochs": 0, "images": 60}


def rate(step: int) -> float:
    if step < 1:
        return 0.01 / 2
    passed = sum(step - 1 >= part * 11 for part in (0.7, 0.9))
    return 0.01 * 0.1**passed


def bare(program: Program) -> dict[str, list[float]]:
    model = program.model()
    optimizer = torch.optim.AdamW(model.parameters())
    found: dict[str, list[float]] = {"loss": [], "present": [], "label": [], "box": []}
    for step, (images, targets) in enumerate(program.batches()):
        outputs = model.head(model.body(images)).permute(0, 2, 3, 1)
        there = torch.zeros(8, 4, 4).double()
        label, box, boxes = 0.0, 0.0, 0
        for image, target in enumerate(targets):
            for corners, kind in zip(target["boxes"], target["labels"], strict=True):
                row = int((corners[1] + corners[3]) / 16)
                column = int((corners[0] + corners[2]) / 16)
                there[image, row, column] = 1
                said = outputs[image, row, column]
                label = label + cross_entropy(said[1:3], kind)
                off = (said[3:].exp() * 8 - corners).abs()
                box = box + torch.where(off < 1, off**2 / 2, off - 0.5).sum() / 8
                boxes += 1
        present = binary_cross_entropy_with_logits(outputs[..., 0], there, reduction="sum")
        value = (present + label + box) / boxes
        optimizer.zero_grad()
        value.backward()
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        for name, part in (("present", present), ("label", label), ("box", box)):
            found[name].append(part.item() / boxes)
        found["loss"].append(value.item())
    return found


@pytest.mark.ranks(1, 2)
def test_the_curves_are_those_of_the_bare_loop(group: Group) -> None:
    program = Program("detection", **SMALL)
    ours = program.curves(group)
    for name, values in bare(program).items():
        assert_equal(ours[name], values)
