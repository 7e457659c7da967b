"""Checkpoint files as somebody would damage or plant them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from ddp_kit.checkpoint.format.layout import MANIFEST, STATE, seal

NEW = "step-00000004"
OLD = "step-00000002"


FILES = [MANIFEST, STATE, "rank-0.safetensors", "rank-1.safetensors"]


class Payload:
    """What a pickle would run."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def resealed(content: bytes, **changes: object) -> bytes:
    """Returns a manifest with other fields and a right SHA-256: what someone would write on purpose."""
    found = {**json.loads(content), **changes}
    found.pop("sha256", None)
    return seal(json.dumps(found, indent=1).encode())
