"""Who is to blame when nothing moves: a verdict from what all ranks said last.

It is a function of values: no clock, no store, no process is asked here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ddp_kit.distributed.pulse import Phase
from ddp_kit.io.process import state_words
from ddp_kit.watchdog.news import Seen

WAITS = {
    Phase.START: "wait at the start",
    Phase.BACKWARD: "wait in the gradient all-reduce",
    Phase.REDUCE: "wait in the sums of the step",
    Phase.CONTROL: "wait for the control packet",
    Phase.EVALUATION: "wait in the evaluation",
    Phase.SAVE: "wait in the save",
    Phase.END: "wait at the end",
}
MANY = 8  # ranks that are listed one by one


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What hangs, in one sentence, and on which ranks; none: all wait for the network."""

    text: str
    culprits: tuple[int, ...]


def judge(ranks: Sequence[Seen]) -> Verdict | None:
    """Returns who hangs, None while somebody who is not overdue may still go on.

    Those who are furthest behind are waited for by the others: only they can be to blame, and only
    once they have taken longer than their own phase may.
    """
    here = [seen for seen in ranks if not seen.news.has_left]
    if not here:
        return None
    last = min(seen.position for seen in here)
    behind = [seen for seen in here if seen.position == last]
    if any(seen.idle_s < seen.news.limit_s for seen in behind):
        return None
    culprits = _fewest_collectives(behind)
    others = [seen for seen in here if seen not in culprits]
    if len(culprits) == len(here) and len(here) > 1:
        return _all_alike(culprits)
    if _entered_alone(culprits, others):
        words = _extra_words(culprits, others)
    else:
        words = _being(culprits)
    text = f"HUNG at step {culprits[0].news.step}: {words}{_waiting(others)}"
    return Verdict(text=text, culprits=tuple(seen.news.rank for seen in culprits))


def _fewest_collectives(behind: Sequence[Seen]) -> list[Seen]:
    """Returns those of ranks at one place who have entered the fewest collectives."""
    counts = [sum(seen.news.sequences.values()) for seen in behind]
    return [seen for seen, count in zip(behind, counts, strict=True) if count == min(counts)]


def _entered_alone(culprits: Sequence[Seen], others: Sequence[Seen]) -> bool:
    """Whether who is behind sits in a collective of its own: it has entered as many as those who
    are further on, or more.
    """
    if not others or not all(seen.news.is_waiting for seen in culprits):
        return False
    if any(seen.position == culprits[0].position for seen in others):
        return False
    for name, count in culprits[0].news.sequences.items():
        counts = [seen.news.sequences.get(name, 0) for seen in others]
        if count and count >= max(counts) and culprits[0].news.line:
            return True
    return False


def _extra_words(culprits: Sequence[Seen], others: Sequence[Seen]) -> str:
    first = culprits[0].news
    line = f" at {first.line}" if first.line else ""
    return (
        f"{_named(culprits)} entered a collective{line} in {_phase(first.phase)} that the others "
        "did not (under `if rank`?)"
    )


def _all_alike(ranks: Sequence[Seen]) -> Verdict:
    """All ranks are at the same place: in their own code, or in one collective."""
    first = ranks[0].news
    every = tuple(seen.news.rank for seen in ranks)
    where = _phase(first.phase)
    own = [seen for seen in ranks if seen.news.line and not seen.news.is_waiting]
    if own or first.phase is Phase.DATA or any(seen.is_frozen for seen in ranks):
        text = f"HUNG at step {first.step}: {_being(ranks)}"
        return Verdict(text=text, culprits=every)
    hosts = sorted({seen.news.host for seen in ranks})
    text = (
        f"HUNG at step {first.step}: all {len(ranks)} ranks have been waiting in the same "
        f"collective in {where} for {_seconds(ranks)}: the network between {', '.join(hosts)}"
    )
    if len(hosts) == 1:
        text += f" ({len(ranks)} ranks on that host)"
    return Verdict(text=text, culprits=())


def _being(culprits: Sequence[Seen]) -> str:
    """Returns what the culprits do, in words."""
    first = culprits[0]
    verb = "has" if len(culprits) == 1 else "have"
    words = f"{_named(culprits)} {verb} been in {_phase(first.news.phase)} for {_seconds(culprits)}"
    if first.news.line:
        words += f", at {first.news.line}"
    if first.news.detail:
        words += f", {first.news.detail}"
    for seen in culprits:
        if seen.is_frozen:
            words += f"; rank {seen.news.rank} {state_words(seen.state)}"
    return words


def _seconds(ranks: Sequence[Seen]) -> str:
    return f"{min(seen.idle_s for seen in ranks):.0f} s"


def _phase(phase: Phase) -> str:
    words = {Phase.START: "the start", Phase.END: "the end"}
    return words.get(phase, phase.name.lower())


def _named(culprits: Sequence[Seen]) -> str:
    shown = [seen.news for seen in culprits[:MANY]]
    parts = [f"{news.rank} (host {news.host}, pid {news.pid})" for news in shown]
    if len(culprits) > MANY:
        parts.append(f"{len(culprits) - MANY} more")
    noun = "rank" if len(culprits) == 1 else "ranks"
    return f"{noun} {', '.join(parts)}"


def _waiting(others: Sequence[Seen]) -> str:
    """Returns what the other ranks wait for, in words, with a semicolon before it."""
    by_wait: dict[str, list[int]] = {}
    for seen in others:
        default = f"are in {_phase(seen.news.phase)}"
        if seen.news.is_waiting:
            default = f"wait in a collective in {_phase(seen.news.phase)}"
        by_wait.setdefault(WAITS.get(seen.news.phase, default), []).append(seen.news.rank)
    text = ""
    for wait, ranks in by_wait.items():
        if len(ranks) == 1:
            wait = wait.replace("wait", "waits", 1).replace("are in", "is in", 1)
        noun = "rank" if len(ranks) == 1 else "ranks"
        shown = [str(rank) for rank in ranks[:MANY]]
        if len(ranks) > MANY:
            shown.append(f"{len(ranks) - MANY} more")
        text += f"; {noun} {', '.join(shown)} {wait}"
    return text
