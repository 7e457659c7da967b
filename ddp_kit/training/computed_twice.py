"""`--sdc-check`: one micro-batch computed twice, which must give the same bits.

A chip that miscalculates now and then (silent data corruption) shows in nothing else: its numbers
are plausible, and the sum over ranks hides whose they are. The passes run before the step's own,
with its draws, and leave no trace. Where two differ on any rank, all ranks compute some more: an
operation that is not deterministic gives other bits again and again, and on every rank; a chip errs
on its own rank.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ddp_kit.data.rank_batch import RankBatch
from ddp_kit.data.reader import MicroBatch
from ddp_kit.distributed.collectives import gather_bytes, max_over_ranks
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.logs import logger
from ddp_kit.training.agreement import digests_of
from ddp_kit.training.alone import computed_alone
from ddp_kit.training.state import ObjectiveState, Training

MORE = 6  # passes, once two have differed
Digests = tuple[int, ...]  # of the loss and each gradient


class ComputedTwice:
    """Computes a micro-batch twice every so many steps. Every rank calls it, at every step."""

    def __init__(self, training: Training, *, every: int):
        self._training = training
        self._every = every

    def __call__(self, objective: ObjectiveState, batch: RankBatch) -> None:
        """Before an objective's part of a step.

        Raises: DdpKitError on every rank that names the rank that miscalculates.
        """
        training = self._training
        if (training.step + 1) % self._every:
            return
        # Another one each time: what errs may do so for some data alone.
        turn = training.step // self._every
        micro_batch = batch.micro_batches[turn % len(batch.micro_batches)]
        passes = [self._pass(objective, micro_batch) for _ in range(2)]
        if not max_over_ranks(training.group, [int(passes[0] != passes[1])])[0]:
            return
        passes += [self._pass(objective, micro_batch) for _ in range(MORE)]
        own = self._told(objective, micro_batch, passes)
        rows = gather_bytes(training.group, json.dumps(own).encode())
        self._judge([json.loads(row) for row in rows])

    def _pass(self, objective: ObjectiveState, micro_batch: MicroBatch) -> Digests:
        try:
            found = computed_alone(self._training, objective, micro_batch)
        except RuntimeError as error:
            if ".grad()" not in str(error):
                raise
            raise ConfigError(
                "--sdc-check: the model computes activations again in a way that allows no pass "
                "outside the step (checkpoint(use_reentrant=True)). Say use_reentrant=False, or "
                "type --sdc-check 0."
            ) from error
        used = [gradient for gradient in found.gradients if gradient is not None]
        digests = iter(digests_of([found.total, *used]))
        of_loss = next(digests)
        return (of_loss, *(0 if g is None else next(digests) for g in found.gradients))

    def _told(
        self, objective: ObjectiveState, micro_batch: MicroBatch, passes: Sequence[Digests]
    ) -> dict[str, Any]:
        """Returns what this rank found: how many passes are unlike the most common, and in what."""
        usual, count = Counter(passes).most_common(1)[0]
        names = {id(each): name for name, each in self._training.model.named_parameters()}
        gradients = [f"the gradient of {names[id(each)]}" for each in objective.parameters]
        results = ["the loss", *gradients]
        different = []
        for i, result in enumerate(results):
            if any(each[i] != usual[i] for each in passes):
                different.append(result)
        return {
            "odd": len(passes) - count,
            "different": different,
            "results": len(results),
            "micro_batch": micro_batch.request.micro_batch,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _judge(self, rows: Sequence[dict[str, Any]]) -> None:
        """Says what passes that differ mean. The rows are the same on all ranks.

        Raises: DdpKitError if it is a chip.
        """
        training = self._training
        step = training.step + 1
        at = [rank for rank, row in enumerate(rows) if row["odd"]]
        found = rows[at[0]]
        where = f"rank {at[0]} (host {found['host']}, pid {found['pid']})"
        others = f", as have ranks {', '.join(map(str, at[1:]))}" if at[1:] else ""
        said = (
            f"{where} has computed micro-batch {found['micro_batch']} {2 + MORE} times from the "
            f"same data, weights and draws, and {found['odd']} times with other bits in "
            f"{found['different'][0]} ({len(found['different'])} of {found['results']} results)"
            f"{others}"
        )
        # Alone, one that errs once in a while is told by that.
        is_chip = found["odd"] == 1 if len(rows) == 1 else len(at) < len(rows)
        if is_chip:
            steady = "" if len(rows) == 1 else " The other ranks compute the same bits each time."
            raise DdpKitError(
                f"MISCALCULATED at step {step}: {said}.{steady} The step was not applied. A chip "
                "or memory is to be suspected: go on without that device (SLURM: --exclude)."
            )
        training.look_twice = None
        logger.warning(
            "--sdc-check is off from step %d on: %s. So does an operation that is not "
            "deterministic, among which no chip's error can be told; "
            "torch.use_deterministic_algorithms(True) names it.",
            step,
            said,
        )
