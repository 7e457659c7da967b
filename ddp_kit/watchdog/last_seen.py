"""Where ranks were that have died without a word, told by a peer on their host."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from ddp_kit.distributed.pulse import Phase
from ddp_kit.watchdog.peers import Peers
from ddp_kit.watchdog.stacks import users_line_in


def place_in_words(rank: int, *, phase: Phase, step: int, line: str = "") -> str:
    """Returns where a rank was."""
    words = f"rank {rank} was in {phase.name.lower()} of step {step}"
    return f"{words}, at {line}" if line else words


def last_seen(peers: Peers, gone: Sequence[int], *, own: str, folder: Path | None) -> str:
    """Returns where ranks were that have died, as far as is known, and then `own`; "" if nothing is
    known. The stacks that they have left go into `folder`.
    """
    parts = []
    for rank in gone:
        found = peers.last_words(rank)
        if found is None:
            continue
        news, text = found
        line = users_line_in(text)
        parts.append(place_in_words(rank, phase=news.phase, step=news.step, line=line))
        if folder is not None and text:
            _leave_stacks(folder / f"rank-{rank}.txt", text)
    return "; ".join([*parts, own]) if parts else ""


def _leave_stacks(path: Path, text: str) -> None:
    # A full disk may be why it has died.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
