"""`ddp-kit doctor`: one line a check of this place, alone or on all ranks of a launcher.

Its order: rank 0 leaves a file, every rank finds out what it can by itself and tells it, and if all
are there they try clocks, pairs and a sum. Rank 0 judges and prints, and all leave with its code.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ddp_kit.cli.doctor import disk, judged_limits, judged_ranks, judged_together, network
from ddp_kit.cli.doctor.check import Check, text_of
from ddp_kit.cli.doctor.process_facts import device_of, process_facts
from ddp_kit.cli.doctor.talk import LATER_S, Deadline, Talk
from ddp_kit.distributed.rendezvous import place_of, rendezvous
from ddp_kit.distributed.topology import Topology, facts, is_first_rank, read_topology
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.launch.local import processes
from ddp_kit.launch.plan import Plan

WITHIN_S = 20.0
KEEP = 3
# Parts of a talk, each of which may take its time, and then the deadline of the whole.
PARTS = 4
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Options:
    """What was asked for."""

    run_dir: str
    checkpoint_bytes: int
    keep: int
    within_s: float
    json: bool


class Doctor:
    """One rank's examination."""

    def __init__(self, options: Options, topology: Topology):
        self.options = options
        self.topology = topology
        self.talk = Talk(topology, within_s=options.within_s)
        self.checks: list[Check] = []
        self.told: Mapping[int, Any] = {}
        self.skews: Mapping[int, tuple[float, float]] = {}
        self.device = torch.device("cpu")
        self._has_printed = False
        self.token = ExitStack()
        self.deadline = Deadline(
            rank=topology.rank,
            within_s=PARTS * options.within_s + PARTS * LATER_S,
            last_words=self._last_words,
            give_back=self.token.close,
        )

    def examine(self) -> int:
        """Finds out, and on rank 0 judges and prints. Returns: 0 for go, 1 for no-go."""
        try:
            with ExitStack() as stack:
                self.deadline.stage = "finding rank 0"
                self._meet(stack)
                with self.token:
                    self._each_alone()
                return self._verdict(self._all_together())
        except (DdpKitError, RuntimeError) as error:
            # Torch's are RuntimeErrors.
            self._last_words(f"rank {self.topology.rank}, {self.deadline.stage}: {error}")
            return 1
        finally:
            self.deadline.cancel()

    def _meet(self, stack: ExitStack) -> None:
        if self.topology.launcher == "none":
            return
        within = timedelta(seconds=self.options.within_s)
        place = place_of(self.topology)
        self.talk.store = stack.enter_context(rendezvous(self.topology, place, timeout=within))

    def _each_alone(self) -> None:
        """What each rank finds out by itself, and rank 0 hears."""
        self.deadline.stage = "disk"
        home = disk.home_of(self.options.run_dir)
        if self.topology.rank == 0:
            self.talk.tell("token", self.token.enter_context(disk.token(home)))
        own = self._own_facts(home)
        self.talk.tell("facts", own)
        self.deadline.stage = "waiting for all ranks"
        if self.topology.rank == 0:
            self.told = self.talk.hear("facts", self.talk.everybody)
            self._judge_alone(self.told, home)
            self.talk.tell("go", len(self.told) == self.topology.world_size)

    def _all_together(self) -> Mapping[int, Any]:
        """What the ranks find out together, if all are here. Returns all words of it, on rank 0."""
        if self.talk.hear_first("go", parts=2) and self.talk.store is not None:
            return self._together()
        if self.topology.rank:
            return {}
        return {0: {"listening": network.own_listening(self.topology, os.getppid())}}

    def _own_facts(self, home: Path) -> dict[str, object]:
        """What this rank finds out by itself."""
        topology = self.topology
        device, fault = device_of(topology)
        self.device = device
        token = self.talk.hear_first("token")
        found: dict[str, object] = {"places": facts(topology), "sees": disk.sees(token or "")}
        if topology.local_rank == 0:
            found["disk"] = disk.try_disk(home)
        self.deadline.stage = "limits, device and a product"
        return found | process_facts(topology, device, fault=fault)

    def _together(self) -> Mapping[int, Any]:
        """Clocks, pairs, a sum. Returns what all ranks tell of it, on rank 0."""
        topology = self.topology
        if topology.nodes > 1 and topology.local_rank == 0:
            self.deadline.stage = "clocks"
            self.skews = network.clock_skews(self.talk)
        own: dict[str, Any] = {"error": "", "pairs": {}, "sum": {}, "listening": []}
        try:
            self._communicate(own)
        except RuntimeError as error:
            own["error"] = f"{self.deadline.stage}: {str(error).splitlines()[0]}"
        self.talk.tell("network", own)
        self.deadline.stage = "waiting for all ranks"
        if topology.rank:
            return {}
        return self.talk.hear("network", self.talk.everybody)

    def _communicate(self, own: dict[str, Any]) -> None:
        timeout = timedelta(seconds=self.options.within_s)
        assert self.talk.store is not None
        self.deadline.stage = "making a process group"
        with network.joined(self.talk.store, self.topology, self.device, timeout=timeout):
            own["listening"] = network.own_listening(self.topology, os.getppid())
            self.deadline.stage = "pairs"
            own["pairs"] = network.pair_rates(self.topology, self.device, timeout=timeout)
            slowest = min(own["pairs"].values(), default=1e12)
            self.deadline.stage = "a sum over all ranks"
            own["sum"] = network.try_sum(
                self.topology, self.device, slowest=slowest, timeout=timeout
            )
            self.deadline.stage = "leaving the process group"

    def _judge_alone(self, told: Mapping[int, Any], home: Path) -> None:
        """Rank 0's lines about what ranks have found out by themselves."""
        world_size = self.topology.world_size
        self.checks += [
            judged_ranks.ranks_line(told),
            judged_ranks.answers_line(told, world_size=world_size, within_s=self.options.within_s),
            judged_ranks.versions_line(told),
            judged_ranks.environment_line(told),
            judged_ranks.devices_line(told),
            judged_ranks.threads_line(told),
            judged_limits.files_line(told),
            judged_limits.processes_line(told),
            judged_limits.shared_memory_line(told),
            judged_ranks.product_line(told),
        ]
        disks = {rank: own["disk"] for rank, own in told.items() if "disk" in own}
        # Where rank 0 cannot write there is nothing to see, which the disk's own line tells.
        unseen = []
        if self.talk.hear_first("token"):
            unseen = [rank for rank, own in told.items() if not own["sees"]]
        size = self.options.checkpoint_bytes or disk.checkpoint_bytes(self.options.run_dir)
        keep = self.options.keep or disk.keep_of_run(self.options.run_dir) or KEEP
        self.checks += judged_together.disk_lines(
            disks, home=str(home), size=size, keep=keep, unseen=unseen
        )
        needs_s = disk.stop_needs_s(self.options.run_dir)
        is_measured = needs_s > 0
        if not is_measured:
            rate = min(float(found.get("rate", 0)) for found in disks.values())
            nodes = self.topology.nodes
            needs_s = judged_together.stop_needs_s(size=size, rate=rate, nodes=nodes)
        self.checks.append(judged_limits.grace_line(told, needs_s=needs_s, is_measured=is_measured))

    def _verdict(self, together: Mapping[int, Any]) -> int:
        """Rank 0 judges, prints and tells the verdict. Returns it."""
        if self.topology.rank:
            code = self.talk.hear_first("verdict", parts=2)
            self.talk.linger("verdict")
            return 1 if code is None else int(code)
        topology = self.topology
        is_here = len(self.told) == topology.world_size
        if is_here and self.talk.store is not None:
            hosts = {own["topology"]["node_rank"]: own["host"] for own in self.told.values()}
            skews = {str(node): pair for node, pair in self.skews.items()}
            self.checks += [
                judged_limits.clock_line(skews, hosts=hosts, nodes=topology.nodes),
                judged_together.pairs_line(together, self.told),
                judged_together.sum_line(together, world_size=topology.world_size),
            ]
        self.checks.append(judged_together.listening_line(together, nodes=topology.nodes))
        code = int(any(check.verdict == "FAIL" for check in self.checks))
        self._print()
        self.talk.tell("verdict", code)
        heard = together if is_here else self.told
        self.talk.linger("verdict", others=len(heard) - 1)
        return code

    def _last_words(self, why: str) -> None:
        """Prints what is known when it cannot go on."""
        if self.topology.rank:
            print(f"ddp-kit doctor: {why}", file=sys.stderr)
            return
        if not self._has_printed:
            stuck = Check(name="end", verdict="FAIL", figure=why, advice="look there first")
            self.checks.append(stuck)
            self._print()

    def _print(self) -> None:
        self._has_printed = True
        print(text_of(self.checks, as_json=self.options.json, ranks=self.told), flush=True)


def main(argv: Sequence[str]) -> int:
    """The command. Works in one process or as a rank; returns 0 for go, 1 for no-go."""
    import tyro

    def doctor(
        *,
        run_dir: str = "",
        checkpoint_gib: float = 0,
        keep: int = 0,
        within_s: float = WITHIN_S,
        nproc_per_node: int = 0,
        json: bool = False,
    ) -> int:
        """Is this place fit for a run: launcher, versions, devices, limits, network, clocks, disk.

        Start it as the run: ddp-kit doctor; srun ddp-kit doctor;
        torchrun --nproc-per-node 8 --no-python ddp-kit doctor.

        Args:
            run_dir: the run directory whose disk and checkpoints count; default: this folder
            checkpoint_gib: size of a checkpoint; default: that of the run directory's newest
            keep: how many checkpoints are kept; default: as the run directory says, or 3
            within_s: seconds that each part may take, before those that do not answer are named
            nproc_per_node: start so many ranks on this machine first
            json: print JSON
        """
        options = Options(
            run_dir=run_dir,
            checkpoint_bytes=int(checkpoint_gib * GIB),
            keep=keep,
            within_s=within_s,
            json=json,
        )
        if nproc_per_node and not _is_rank():
            return _on_ranks(argv, processes_here=nproc_per_node)
        return _on_this_rank(options)

    code: int = tyro.cli(doctor, args=argv, prog="ddp-kit doctor")
    return code


def _is_rank() -> bool:
    """Whether a launcher has started this process, however well."""
    try:
        return read_topology().launcher != "none"
    except ConfigError:
        return True


def _on_ranks(argv: Sequence[str], *, processes_here: int) -> int:
    """Starts the ranks of this machine, each of which comes here again."""
    plan = Plan(words=("doctor", *argv), processes=processes_here, module="ddp_kit.cli.main")
    return processes.run(plan)


def _on_this_rank(options: Options) -> int:
    try:
        topology = read_topology()
    except ConfigError as error:
        if is_first_rank():
            fault = Check(name="ranks", verdict="FAIL", figure=str(error))
            print(text_of([fault], as_json=options.json, ranks={}))
        return 1
    return Doctor(options, topology).examine()
