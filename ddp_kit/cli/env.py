"""`ddp-kit env`: what to paste into a bug report.

It never fails, since a bug report is wanted most when something is wrong: half-set rank variables
are a line of it. Secrets are blacked out.
"""

from collections.abc import Mapping, Sequence

import torch

from ddp_kit.distributed.topology import Topology, read_topology
from ddp_kit.errors import ConfigError
from ddp_kit.io.json_lines import json_text
from ddp_kit.io.redact import redact
from ddp_kit.lifecycle.env_facts import environment_facts


def main(argv: Sequence[str]) -> int:
    """Prints versions, devices and rank facts. Returns: 0."""
    import tyro

    def env(*, json: bool = False) -> None:
        """What to paste into a bug report: versions, devices, rank facts and where each came from.

        Args:
            json: print JSON, as in a run's env.json
        """
        facts = redact(_facts())
        if json:
            print(json_text(facts, indent=2))
        else:
            print("\n".join(_lines(facts)))

    tyro.cli(env, args=argv, prog="ddp-kit env")
    return 0


def _facts() -> dict[str, object]:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
    try:
        return environment_facts(read_topology(), device)
    except ConfigError as error:
        return {**environment_facts(Topology(), device), "topology": str(error), "source": {}}


def _lines(facts: Mapping[str, object]) -> list[str]:
    lines: list[str] = []
    for title, value in facts.items():
        if not isinstance(value, Mapping):
            lines += [title, f"  {value}"]
        elif value:
            width = max(len(name) for name in value)
            lines.append(title)
            lines += [f"  {name:{width}}  {item}" for name, item in value.items()]
    return lines
