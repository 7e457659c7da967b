"""What `--exact` costs: a training step with it against the plain all-reduce, taking turns in one
run.

    python benchmarks/exact.py    # 2, 4 and 8 ranks, both models; --ranks 4 for one of them

`small`: an MLP 784-128-64-10 with 16 samples a micro-batch. `wide`: three linear layers, 20 MB of
gradients, with 4 samples a micro-batch: the communication is all there is. Two micro-batches a
rank, SGD with momentum, one thread a rank; both contenders run ddp_kit's step.
"""

import argparse
from itertools import pairwise

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from turns import compare, serve, show

from ddp_kit import LossSum, build_loader, process_group, train_step, wrap

TARGET = 1.10  # at 4 ranks
MODELS = {
    "small": ((784, 128, 64, 10), 16, 100),
    "wide": ((1024, 1536, 1536, 1024), 4, 10),
}  # widths, samples a micro-batch, steps a turn


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> LossSum:
    return LossSum(cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1]))


def contender(name: str, model: str) -> None:
    """A rank of one contender."""
    widths, size, _ = MODELS[model]
    with process_group(device="cpu", threads=1) as group:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        net = nn.Sequential(*layers[:-1])
        data = TensorDataset(torch.randn(4096, widths[0]), torch.randint(10, (4096,)))
        feed = build_loader(
            data, group=group, global_batch=2 * size * group.world_size, micro_batch=size
        )
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        training = wrap(net, optimizer, loss, group=group, feed=feed, exact=name == "exact")
        batches = feed.batches(start=0, end=10**9)

        def run(steps: int) -> None:
            for _ in range(steps):
                train_step(training, next(batches))

        serve(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--contender")
    options = parser.parse_args()
    if options.contender:
        contender(options.contender, options.models[0])
        return
    print(f"torch {torch.__version__}; target: at most {TARGET} at 4 ranks")
    for model in options.models:
        for ranks in options.ranks:
            print(f"\n{model}, {ranks} ranks", flush=True)
            steps = MODELS[model][2]
            show(
                compare(
                    ["plain", "exact"],
                    script=__file__,
                    world_size=ranks,
                    rounds=options.rounds,
                    steps=steps,
                    arguments=["--models", model],
                )
            )


if __name__ == "__main__":
    main()
