"""Writing a file so that a reader finds the old or the new content whole."""

import os
from pathlib import Path


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Writes a UTF-8 text file aside, in the same folder, and renames it into place.

    A reader finds the old or the new content, whenever this process dies.

    Args: `durable` content and name are on disk when this returns: they outlive the machine too.
    Raises: OSError if it cannot be written; then the old content stays, and nothing beside it.
    """
    # Named after host and process: nodes share run directories, and two ranks may write one file.
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if durable:
        # The new name is on disk only after this.
        sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on disk.

    Raises: OSError if there is no such path, or the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
