"""A recipe with secrets among its settings that says them wherever it can; `--fails-at` raises with them in the message."""

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import torch
from cases import classify, plain, vectors
from torch import nn

import ddp_kit
from ddp_kit import Data, Recipe


@dataclass(frozen=True, kw_only=True)
class Login:
    """Where the data are."""

    user: str = "somebody"
    api_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """The default of `label_key` is a word, and no secret."""

    global_batch: int = 8
    max_steps: int = 6
    save_every: int = 2
    log_every: int = 1
    device: Any = "cpu"
    token: str = ""
    label_key: str = "accuracy"
    pin_password: str = ""
    source: str = ""
    login: Login = field(default_factory=Login)
    fails_at: int = -1
    warns: bool = False


class Says:
    """A callback that says the secrets."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def words(self) -> str:
        own = self.settings
        return f"{own.token}, https://host/x?t={quote(own.token, safe='')}, {own.login.api_key!r}, from {own.source}"

    def on_start(self, model: nn.Module) -> None:
        print("printed", self.words())
        sys.stderr.write(f"to stderr {self.words()}\n")
        logging.getLogger("ddp_kit").info("logged %s", self.words())
        if self.settings.warns:
            warnings.warn(f"warned {self.words()}", stacklevel=1)

    def on_step(self, step: int) -> None:
        time.sleep(0.2)  # for a save to end
        if step == self.settings.fails_at:
            raise ValueError(f"refused: {self.words()}")

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is to be done."""

    def on_end(self, reason: str) -> None:
        """Nothing is to be done."""


def recipe(settings: Settings) -> Recipe:
    return Recipe(
        model=plain,
        loss=classify,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        train_data=lambda: Data(vectors()),
        eval_data=vectors,
        callbacks=[Says(settings)],
    )
