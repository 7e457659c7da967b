"""What one rank tells the others of itself, once a second, and what they make of its silence."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ddp_kit.distributed.pulse import Phase


@dataclass(frozen=True, kw_only=True)
class News:
    """One rank's own words. `number` counts them; times are spans, since clocks differ.

    `sequences`: how many collectives it has entered, by process group. `line` is the innermost line
    of the user's code that the main thread is in, `is_waiting` whether that thread sits in a
    collective, `detail` what else is known of its wait. `has_left`: it has left the group.
    `namespace` is that of its pid, `pulse_file` and `stack_file` are the descriptors by which peers
    on its host find its pulse, and its stacks once it was sent `pulse_file.STACK_SIGNAL`.
    """

    rank: int
    host: str = ""
    pid: int = 0
    number: int = 0
    phase: Phase = Phase.START
    step: int = 0
    part: int = 0
    idle_s: float = 0.0
    limit_s: float = 0.0
    sequences: dict[str, int] = field(default_factory=dict)
    namespace: str = ""
    pulse_file: int = -1
    stack_file: int = -1
    line: str = ""
    is_waiting: bool = False
    detail: str = ""
    has_left: bool = False

    def text(self) -> str:
        """Returns it as it travels."""
        return json.dumps(asdict(self))


def read_news(text: str) -> News | None:
    """Returns a rank's words; None of what is not such."""
    try:
        found: dict[str, Any] = json.loads(text)
        known = {each.name for each in fields(News)}
        values = {name: value for name, value in found.items() if name in known}
        values["phase"] = Phase(values["phase"])
        return News(**values)
    except (AttributeError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A rank as another one sees it: its last words, and for how long there were no new ones.

    `state` is that of its process as its host's kernel tells it, "" where that is not known;
    `is_frozen`: it says nothing any more.
    """

    news: News
    silent_s: float = 0.0
    is_frozen: bool = False
    state: str = ""

    @property
    def host(self) -> tuple[str, str]:
        """Where its pid holds."""
        return (self.news.host, self.news.namespace)

    @property
    def idle_s(self) -> float:
        """Seconds without progress, as far as can be told."""
        return self.news.idle_s + self.silent_s

    @property
    def is_stuck(self) -> bool:
        """Whether it is there and says nothing any more."""
        return self.is_frozen and self.news.pid > 0 and self.state != "gone"

    @property
    def position(self) -> tuple[int, int, int]:
        """How far it is: less is further behind."""
        return (self.news.step, self.news.part, int(self.news.phase))
