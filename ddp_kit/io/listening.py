"""At which addresses a process of this host waits for connections, as Linux tells it."""

import socket
from collections.abc import Iterator
from pathlib import Path

LISTENS = "0A"
TABLES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}


def listening(pid: str, *, proc: Path = Path("/proc")) -> list[str]:
    """Returns the addresses with ports, for instance "127.0.0.1:29500" or "[::]:29500".

    Args: `pid` of the process, or `self`.
    """
    own = set(_sockets(proc / pid / "fd"))
    found = set()
    for table, family in TABLES.items():
        for line in _lines(proc / pid / "net" / table):
            words = line.split()
            if len(words) > 9 and words[3] == LISTENS and words[9] in own:
                found.add(_address(words[1], family))
    return sorted(found)


def is_local(address: str) -> bool:
    """Whether only this host can reach an address of `listening`."""
    return address.startswith(("127.", "[::1]", "[::ffff:127."))


def _sockets(folder: Path) -> Iterator[str]:
    """Yields the numbers of a process's sockets."""
    try:
        links = list(folder.iterdir())
    except OSError:
        return
    for link in links:
        try:
            target = str(link.readlink())
        except OSError:
            # Closed meanwhile.
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _address(text: str, family: socket.AddressFamily) -> str:
    """Reads an address as the kernel writes it: words of 4 bytes, each in the host's order."""
    host, _, port = text.partition(":")
    raw = bytes.fromhex(host)
    turned = b"".join(raw[at : at + 4][::-1] for at in range(0, len(raw), 4))
    name = socket.inet_ntop(family, turned)
    if family == socket.AF_INET6:
        name = f"[{name}]"
    return f"{name}:{int(port, 16)}"
