"""Files that only their owner may read: a recipe's flags may be passwords and tokens."""

import os
from pathlib import Path

OWNERS = 0o600


def claim_private(path: Path) -> None:
    """Makes an empty file that only its owner may read, or takes what others may from one."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, OWNERS))
    path.chmod(OWNERS)


def write_private(path: Path, text: str) -> None:
    """Writes a text that only the owner may read. Raises: OSError if it cannot be written."""
    claim_private(path)
    path.write_text(text, encoding="utf-8")
