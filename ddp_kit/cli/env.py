"""`ddp-kit env`: what to paste into a bug report.

Owns: the layout of the report. Refuses: secrets, and failing; half-set rank variables are part of the report.
"""

from collections.abc import Mapping, Sequence

import torch

from ddp_kit.distributed.topology import Topology, read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.redact import redact
from ddp_kit.lifecycle.env_facts import describe


def main(argv: Sequence[str]) -> int:
    """Prints versions, devices and rank facts. Returns: 0."""
    import tyro

    def env(*, json: bool = False) -> None:
        """What to paste into a bug report: versions, devices, rank facts and where each came from.

        Args:
            json: print JSON, as in a run's env.json
        """
        facts = redact(_facts())
        print(json_text(facts, indent=2) if json else "\n".join(_lines(facts)))

    tyro.cli(env, args=argv, prog="ddp-kit env")
    return 0


def _facts() -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return describe(read_topology(), device)
    except ConfigError as error:
        return {**describe(Topology(), device), "topology": str(error), "source": {}}


def _lines(facts: Mapping[str, object]) -> list[str]:
    lines: list[str] = []
    for title, value in facts.items():
        if isinstance(value, Mapping):
            width = max((len(name) for name in value), default=0)
            rows = [f"  {name:{width}}  {item}" for name, item in value.items()]
        else:
            rows = [f"  {value}"]
        lines += [title, *rows] if rows else []
    return lines
