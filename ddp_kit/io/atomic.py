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


def write_over(path: Path, text: str) -> None:
    """Writes a text over the content of a file that is there.

    For a full disk, where no file has room beside it: a text that fits into the file's own blocks
    needs none. A reader may see it torn.

    Raises: OSError if it cannot be written.
    """
    content = text.encode()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_private_folder(path: Path) -> None:
    """Makes a folder into which only its owner may look, if it is not there; those above it are as
    the umask has them. A stricter umask stays.

    Raises: OSError if it cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
