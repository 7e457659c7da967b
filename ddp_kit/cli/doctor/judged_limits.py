"""Rank 0's judgement of limits: open files, processes, shared memory, clocks, a stop's time."""

from collections.abc import Mapping, Sequence

from ddp_kit.cli.doctor.check import (
    MIB,
    Check,
    Facts,
    Verdict,
    by_node,
    least,
    size_text,
    too_low,
)
from ddp_kit.errors import some

# Open files of a rank with loader workers, apart from its connections to others.
FILES = 256
FILES_A_PEER = 4
ENOUGH_FILES = 4096
# Processes and threads that a rank with loader workers starts.
PROCESSES = 128
# What passes between a rank and its loader workers.
SHARED = 64 * MIB
# NCCL's own buffers between two GPUs of a node.
SHARED_BY_NCCL = 32 * MIB
SKEW_WARN_S = 1.0
SKEW_FAIL_S = 60.0


def files_line(facts: Facts) -> Check:
    """As many files and connections may be open as a rank needs."""
    need = FILES + FILES_A_PEER * len(facts)
    low = too_low(facts, lambda own: own["limits"]["files"], need)
    if not low:
        fewest = least(facts, lambda own: own["limits"]["files"])
        return Check(name="open files", figure=f"{fewest} may be open, {need} are needed")
    most = least(facts, lambda own: own["limits"]["most_files"])
    return Check(
        name="open files",
        verdict="FAIL",
        figure=f"{low} may be open, {need} are needed",
        advice=f"ulimit -n {ENOUGH_FILES} before the start; more than {most} only root can allow",
    )


def processes_line(facts: Facts) -> Check:
    """As many processes and threads may be started as the ranks of a node need."""
    most = max(len(ranks) for ranks in by_node(facts).values())
    need = PROCESSES * most
    low = too_low(facts, lambda own: own["limits"]["processes"], need)
    if low:
        return Check(
            name="processes",
            verdict="FAIL",
            figure=f"{low} may still be started, the ranks of a node need {need}",
            advice="raise pids.max of the container or job, or ulimit -u",
        )
    fewest = least(facts, lambda own: own["limits"]["processes"])
    return Check(name="processes", figure=f"{fewest} may still be started, {need} are needed")


def shared_memory_line(facts: Facts) -> Check:
    """Loader workers and NCCL have room in /dev/shm."""
    worst: Verdict = "ok"
    said = []
    for ranks in by_node(facts).values():
        own = facts[ranks[0]]
        free = own["limits"]["shared_free"]
        is_nccl = own["device"].startswith("cuda ") and len(ranks) > 1
        needed = MIB
        if is_nccl:
            needed = SHARED_BY_NCCL * len(ranks)
        if free >= SHARED * len(ranks):
            continue
        size = own["limits"]["shared_size"]
        said.append(f"{own['host']}: {size_text(free)} free of {size_text(size)} in /dev/shm")
        if free < needed:
            worst = "FAIL"
        elif worst == "ok":
            worst = "warn"
    if said:
        return Check(
            name="shared memory",
            verdict=worst,
            figure=some(said),
            advice="give the container more (--shm-size, --ipc=host), or --num-workers 0",
        )
    least_free = min(own["limits"]["shared_free"] for own in facts.values())
    return Check(name="shared memory", figure=f"{size_text(least_free)} free in /dev/shm")


def clock_line(
    skews: Mapping[str, Sequence[float]], *, hosts: Mapping[int, str], nodes: int
) -> Check:
    """The nodes' clocks agree with rank 0's."""
    if nodes == 1:
        return Check(name="clocks", figure="one node, one clock")
    silent = [node for node in range(1, nodes) if str(node) not in skews]
    if silent:
        named = some([hosts.get(node, f"node {node}") for node in silent])
        return Check(
            name="clocks",
            verdict="FAIL",
            figure=f"no answer came from {named}",
            advice="look at that node: it had answered before",
        )
    far = {}
    for node, (skew, error) in skews.items():
        # What the question's own time explains is no skew.
        far[int(node)] = max(0.0, abs(skew) - error)
    worst = max(far, key=lambda node: far[node])
    skew, error = skews[str(worst)]
    host = hosts.get(worst, f"node {worst}")
    figure = f"{host} is {skew:+.3g} s from rank 0's clock (within {error:.2g} s)"
    if far[worst] <= SKEW_WARN_S:
        return Check(name="clocks", figure=f"the farthest: {figure}")
    return Check(
        name="clocks",
        verdict="FAIL" if far[worst] > SKEW_FAIL_S else "warn",
        figure=figure,
        advice="mend its time service: logs are merged by time, and a job's end is one",
    )


def grace_line(facts: Facts, *, needs_s: float, is_measured: bool) -> Check:
    """A stop has the time that it needs."""
    has_s = facts[0]["grace"]["has_s"]
    giver = facts[0]["grace"]["giver"]
    needs = "what a stop needs is measured at a run's first save"
    if needs_s:
        how = "was measured to need" if is_measured else "is estimated to need"
        needs = f"a stop {how} {needs_s:.3g} s"
    if not has_s:
        return Check(name="grace", figure=f"no limit is known; {needs}")
    figure = f"{giver} gives {has_s:.3g} s; {needs}"
    if needs_s <= has_s:
        return Check(name="grace", figure=figure)
    return Check(
        name="grace",
        verdict="FAIL" if is_measured else "warn",
        figure=figure,
        advice="ask the launcher for a longer grace (ddp-kit slurm --warn-s)",
    )
