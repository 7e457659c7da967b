"""recipes/ported/center_loss.py has the curves of a bare loop with two optimizers."""

import pytest
import torch
from ported import Program, assert_equal
from torch.nn.functional import cross_entropy

from ddp_kit.distributed.process_group import Group

SMALL = {"global_batch": 16, "micro_batch": 5, "epochs": 0}


def bare(program: Program) -> dict[str, list[float]]:
    model = program.model()
    net = [weight for name, weight in model.named_parameters() if name != "centres"]
    of_net = torch.optim.SGD(net, lr=0.02, momentum=0.9, weight_decay=5e-4)
    of_centres = torch.optim.SGD([model.centres], lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(of_net, 4, gamma=0.5)
    found: dict[str, list[float]] = {"loss": [], "distance": []}
    for images, labels in program.batches():
        features, logits = model(images)
        squares = torch.cdist(features, model.centres).square()
        distance = squares[torch.arange(16), labels].sum() / 16
        value = cross_entropy(logits, labels) + 0.1 * distance
        of_net.zero_grad()
        of_centres.zero_grad()
        value.backward()
        of_net.step()
        model.centres.grad.mul_(1 / 0.1)
        of_centres.step()
        scheduler.step()
        found["loss"].append(value.item())
        found["distance"].append(distance.item())
    return found


@pytest.mark.ranks(1, 2)
def test_the_curves_are_those_of_the_bare_loop(group: Group) -> None:
    program = Program("center_loss", **SMALL)
    ours = program.curves(group)
    for name, values in bare(program).items():
        assert_equal(ours[name], values)
