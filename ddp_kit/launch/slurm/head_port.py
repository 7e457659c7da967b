"""The port of the store on a job's first node, which its agents agree on by a file."""

import contextlib
import socket
from pathlib import Path

from ddp_kit.io.atomic import write_text
from ddp_kit.io.polling import wait_until
from ddp_kit.launch.environment import environment

# until the first node has said on which port its store listens
LIMIT_S = 120.0
POLL_S = 0.1
FIRST_PORT = 20000
PORTS = 10000


def head_port(path: Path, *, is_head: bool) -> int:
    """Returns the port of the first node's store, which that node writes to `path`.

    Raises: RuntimeError on the other nodes if there is no such file after two minutes.
    """
    if not is_head:
        return _told_port(path)
    port = _free_port()
    write_text(path, str(port))
    return port


def _told_port(path: Path) -> int:
    if not wait_until(path.exists, within_s=LIMIT_S, pause_s=POLL_S):
        raise RuntimeError(
            f"{socket.gethostname()}: the job's first node has not said its port "
            f"within {LIMIT_S:g} s ({path})"
        )
    return int(path.read_text())


def _free_port() -> int:
    """Returns the first free port from the job's own on: two jobs may share a node."""
    requeues = int(environment().get("SLURM_RESTART_COUNT", "0"))
    own = int(environment()["SLURM_JOB_ID"]) * 7 + requeues
    candidates = (FIRST_PORT + (own + step) % PORTS for step in range(PORTS))
    return next(port for port in candidates if _is_free(port))


def _is_free(port: int) -> bool:
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    with contextlib.closing(socket.socket(family)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
