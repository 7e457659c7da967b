"""The recipe of `blocks` as a file, with deaths as in `mortal`."""

import os
from dataclasses import dataclass

from blocks import Split, split
from mortal import Death

from ddp_kit import Recipe


@dataclass(frozen=True, kw_only=True)
class Settings(Split):
    """12 steps."""

    max_steps: int = 12
    log_every: int = 1
    eval_every: int = 4


def recipe(settings: Settings) -> Recipe:
    return split(settings, callbacks=[Death(os.environ.get("DEATHS", ""))])
