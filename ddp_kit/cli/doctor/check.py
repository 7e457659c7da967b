"""A check's outcome, and how the ranks' facts are put into words."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ddp_kit.errors import some
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.tables import aligned

Verdict = Literal["ok", "warn", "FAIL"]
Facts = Mapping[int, Mapping[str, Any]]

GIB = 2**30
MIB = 2**20
QUOTE = '"'


@dataclass(frozen=True, kw_only=True)
class Check:
    """What came of one check."""

    name: str
    verdict: Verdict = "ok"
    figure: str
    advice: str = ""


def text_of(checks: Sequence[Check], *, as_json: bool, ranks: Mapping[int, Any]) -> str:
    """Returns what is printed."""
    is_go = all(check.verdict != "FAIL" for check in checks)
    if as_json:
        listed = [asdict(check) for check in checks]
        return json_text({"go": is_go, "checks": listed, "ranks": ranks}, indent=2)
    rows = []
    for check in checks:
        figure = check.figure
        if check.advice:
            figure = f"{figure}. To do: {check.advice}."
        rows.append((check.verdict, check.name, figure))
    return "\n".join([*aligned(rows), "go" if is_go else "no-go"])


def size_text(size: float) -> str:
    """Returns a size in words."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def differences(facts: Facts, what: str) -> str:
    """Returns in which items the ranks' facts differ, "" if in none."""
    names = sorted(set().union(*(own[what] for own in facts.values())))
    said = []
    for name in names:
        by_value: dict[str, list[int]] = defaultdict(list)
        for rank, own in facts.items():
            by_value[json.dumps(own[what].get(name, "none"))].append(rank)
        if len(by_value) > 1:
            values = [
                f"{value.strip(chr(34))} on {ranks_in_words(by_value[value])}" for value in by_value
            ]
            said.append(f"{name} {', '.join(values)}")
    return some(said)


def by_node(facts: Facts) -> dict[int, list[int]]:
    """Returns the ranks of each node."""
    nodes: dict[int, list[int]] = defaultdict(list)
    for rank in sorted(facts):
        nodes[facts[rank]["topology"]["node_rank"]].append(rank)
    return nodes


def too_low(facts: Facts, limit: Callable[[Mapping[str, Any]], int | None], need: int) -> str:
    """Returns the limits below a need, with their ranks; "" if there are none."""
    low: dict[int, list[int]] = defaultdict(list)
    for rank, own in facts.items():
        found = limit(own)
        if found is not None and found < need:
            low[found].append(rank)
    return some([f"on {ranks_in_words(ranks)} {found}" for found, ranks in sorted(low.items())])


def least(facts: Facts, limit: Callable[[Mapping[str, Any]], int | None]) -> str:
    """Returns the smallest of the ranks' limits in words."""
    found = [number for number in map(limit, facts.values()) if number is not None]
    return str(min(found)) if found else "any number"


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Returns ranks in words."""
    named = some([str(rank) for rank in ranks])
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"


def count(number: int, what: str) -> str:
    """Returns a number of things in words."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
