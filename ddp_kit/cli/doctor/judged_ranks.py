"""Rank 0's judgement of the ranks themselves: are they all here, alike, and each with a device."""

from collections import defaultdict

from ddp_kit.cli.doctor.check import (
    Check,
    Facts,
    by_node,
    count,
    differences,
    ranks_in_words,
)
from ddp_kit.distributed.node_check import wrong_devices
from ddp_kit.errors import some


def ranks_line(facts: Facts) -> Check:
    """The launcher's variables agree, on all ranks."""
    first = facts[0]["topology"]
    figure = f"{count(first['world_size'], 'rank')} on {count(first['nodes'], 'node')}"
    if first["launcher"] != "none":
        figure += f" by {first['launcher']}"
    figure += f": {facts[0]['places']}"
    odd = {}
    for rank, own in facts.items():
        theirs = own["topology"]
        if any(theirs[name] != first[name] for name in ("world_size", "nodes", "launcher")):
            odd[rank] = f"rank {rank} has {own['places']}"
    if not odd:
        return Check(name="ranks", figure=figure)
    return Check(
        name="ranks",
        verdict="FAIL",
        figure="; ".join([figure, *odd.values()]),
        advice="start all ranks with one command, and unset what an earlier one has left",
    )


def answers_line(facts: Facts, *, world_size: int, within_s: float) -> Check:
    """Every rank has answered."""
    silent = [rank for rank in range(world_size) if rank not in facts]
    if not silent:
        return Check(name="answers", figure=f"all of {count(world_size, 'rank')}")
    return Check(
        name="answers",
        verdict="FAIL",
        figure=f"{ranks_in_words(silent)} did not answer within {within_s:.0f} s",
        advice="look at its node and at its output: was it started, does it reach rank 0's port",
    )


def versions_line(facts: Facts) -> Check:
    """All ranks have the same packages."""
    found = differences(facts, "versions")
    if found:
        return Check(
            name="versions",
            verdict="FAIL",
            figure=found,
            advice="start all ranks from one environment",
        )
    own = facts[0]["versions"]
    shown = [f"{name} {own[name]}" for name in ("torch", "python", "nccl", "cuda") if name in own]
    return Check(name="versions", figure=f"{', '.join(shown)}, the same on all ranks")


def environment_line(facts: Facts) -> Check:
    """Variables that change numbers or speed are the same on all ranks."""
    found = differences(facts, "environment")
    if found:
        return Check(
            name="variables",
            verdict="warn",
            figure=found,
            advice="export the same on all nodes",
        )
    number = len(facts[0]["environment"])
    return Check(name="variables", figure=f"{number} that libraries read, the same on all ranks")


def devices_line(facts: Facts) -> Check:
    """There is a device for each rank."""
    has_cuda = any(own["device"].startswith("cuda ") for own in facts.values())
    faults = []
    idle = []
    for node, ranks in by_node(facts).items():
        names = [facts[rank]["device"] for rank in ranks]
        wrong = wrong_devices(names, others_have_cuda=has_cuda)
        visible = max(facts[rank]["visible"] for rank in ranks)
        host = facts[ranks[0]]["host"]
        if wrong:
            faults.append(f"{host} (node {node}): {wrong}")
        elif visible > len(ranks):
            idle.append(f"{host} (node {node}): {visible} GPUs for {count(len(ranks), 'rank')}")
    if faults:
        return Check(
            name="devices",
            verdict="FAIL",
            figure="; ".join(faults),
            advice="start as many ranks on a node as it has GPUs, and look at CUDA_VISIBLE_DEVICES",
        )
    if idle:
        return Check(
            name="devices",
            verdict="warn",
            figure=some(idle),
            advice="some GPUs stay idle: start more ranks",
        )
    kind = "a GPU" if has_cuda else "the CPU"
    return Check(name="devices", figure=f"{kind} for each rank")


def threads_line(facts: Facts) -> Check:
    """The CPU threads of a node's ranks have cores."""
    crowded = []
    for ranks in by_node(facts).values():
        wanted = sum(facts[rank]["threads"] for rank in ranks)
        usable = max(facts[rank]["cores"] for rank in ranks)
        if wanted > usable:
            host = facts[ranks[0]]["host"]
            crowded.append(f"{host}: {wanted} threads of {len(ranks)} ranks on {usable:g} cores")
    if crowded:
        return Check(
            name="threads",
            verdict="warn",
            figure=some(crowded),
            advice="ask for more cores (--cpus-per-task), set OMP_NUM_THREADS, or type --threads",
        )
    own = facts[0]
    figure = f"{count(own['threads'], 'thread')} a rank, {own['cores']:g} cores for a node's ranks"
    return Check(name="threads", figure=figure)


def product_line(facts: Facts) -> Check:
    """A matrix product has the same bits each time, and on all chips of a kind."""
    wrong = [rank for rank, own in facts.items() if not own["product"]["is_same"]]
    if wrong:
        hosts = ", ".join(sorted({facts[rank]["host"] for rank in wrong}))
        return Check(
            name="product",
            verdict="FAIL",
            figure=f"a repeated product has other bits on {ranks_in_words(wrong)} ({hosts})",
            advice="leave that chip out: it miscalculates",
        )
    kinds: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in facts.items():
        kinds[own["product"]["where"]][own["product"]["bits"]].append(rank)
    rates = [own["product"]["tflops"] for own in facts.values()]
    figure = f"the same bits each time, {min(rates):.3g} to {max(rates):.3g} TFLOP/s a rank"
    for where, by_bits in kinds.items():
        if len(by_bits) > 1:
            fewest = min(by_bits.values(), key=len)
            return Check(
                name="product",
                verdict="warn",
                figure=f"{figure}; {ranks_in_words(fewest)}: other bits than others on {where}",
                advice="other libraries or chips: numbers differ with where a rank runs",
            )
    return Check(name="product", figure=figure)
