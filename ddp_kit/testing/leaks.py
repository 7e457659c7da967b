"""What a test has left behind: threads, child processes, process groups, variables, files.

The difference is named and not cleaned up: whoever made it does that.
"""

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ddp_kit.distributed.topology import environment

# Set or started once by a library and kept for the process's life by design.
LIBRARIES_VARIABLES = (
    "PYTEST_",
    "TORCHINDUCTOR_",
    "_TORCHINDUCTOR_",
    "TRITON_",
    "KINETO_",
    "KMP_",
    "COV_CORE_",
)
LIBRARIES_PROCESSES = (
    "ddp_kit.testing.server",
    "multiprocessing.resource_tracker",
    "multiprocessing.forkserver",
    "compile_worker",
)
LIBRARIES_THREADS = ("pytest_timeout", "pydevd", "execnet", "InductorSubproc", "tqdm_monitor")
CACHES = ("__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".coverage")


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What a process has at one moment; children are by pid."""

    threads: frozenset[threading.Thread]
    processes: Mapping[int, str]
    groups: frozenset[str]
    variables: Mapping[str, str]
    folder: Path
    files: frozenset[str]


def take_stock() -> Stock:
    """Returns what this process has now."""
    folder = Path.cwd()
    names = [path.name for path in folder.iterdir()]
    return Stock(
        threads=frozenset(thread for thread in threading.enumerate() if _is_own(thread)),
        processes=_children(),
        groups=_groups(),
        variables={
            name: value
            for name, value in environment().items()
            if not name.startswith(LIBRARIES_VARIABLES)
        },
        folder=folder,
        files=frozenset(name for name in names if not name.startswith(CACHES)),
    )


def leaks_since(before: Stock, *, wait_s: float = 1.0) -> list[str]:
    """Returns a line for each thing that was not there before.

    Threads and children about to end have up to `wait_s` seconds to do so.
    """
    now = take_stock()
    if _is_busier(now, before):
        # A loader's workers end when its iterator is collected.
        gc.collect()
        now = take_stock()
        end = time.monotonic() + wait_s
        while _is_busier(now, before) and time.monotonic() < end:
            time.sleep(0.02)
            now = take_stock()
    return _difference(before, now)


def _is_busier(now: Stock, before: Stock) -> bool:
    return bool(now.threads - before.threads or now.processes.keys() - before.processes.keys())


def _difference(before: Stock, now: Stock) -> list[str]:
    found = []
    for thread in sorted(now.threads - before.threads, key=lambda thread: thread.name):
        kind = " (daemon)" if thread.daemon else ""
        found.append(f"leaked thread: {thread.name!r}{kind}")
    new_pids = sorted(now.processes.keys() - before.processes.keys())
    found += [f"leaked process: pid {pid}: {now.processes[pid]}" for pid in new_pids]
    found += [f"leaked process group: {name}" for name in sorted(now.groups - before.groups)]
    found += _changed_variables(before.variables, now.variables)
    if now.folder != before.folder:
        found.append(f"working directory left changed: {before.folder} -> {now.folder}")
        return found
    new_files = sorted(now.files - before.files)
    return found + [f"file left in the working directory: {name}" for name in new_files]


def _changed_variables(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns a line for each variable, with its name alone: its value may be a secret."""
    lines = []
    for name in sorted(before.keys() | now.keys()):
        if name not in before:
            lines.append(f"environment variable left set: {name}")
        elif name not in now:
            lines.append(f"environment variable left unset: {name}")
        elif before[name] != now[name]:
            lines.append(f"environment variable left changed: {name}")
    return lines


def _is_own(thread: threading.Thread) -> bool:
    return not isinstance(thread, threading._DummyThread) and not thread.name.startswith(
        LIBRARIES_THREADS
    )


def _groups() -> frozenset[str]:
    distributed = sys.modules.get("torch.distributed.distributed_c10d")
    if distributed is None:
        return frozenset()
    world = distributed._world  # torch has no public list of groups
    return frozenset(
        f"{world.pg_names[group]} ({world.pg_map[group][0]})"
        for group in list(world.pg_map)
        if group in world.pg_names
    )


def _children() -> dict[int, str]:
    """Returns the living children of this process, by pid.

    Members of its session are children too: those whose parent has ended.
    """
    own = os.getpid()
    children = {}
    for pid, (parent, session, command) in _process_table().items():
        is_child = pid != own and own in (parent, session)
        if is_child and not any(name in command for name in LIBRARIES_PROCESSES):
            children[pid] = command
    return children


def _process_table() -> dict[int, tuple[int, int, str]]:
    """Returns pid -> (parent, session, command) without zombies and what ends meanwhile."""
    if not Path("/proc/self/stat").exists():
        return _process_table_of_ps()
    table = {}
    own = os.getpid()
    # Path.iterdir takes ten times as long, and every test pays twice.
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", "rb") as file:  # noqa: PTH123
                state, parent, _, session = file.read().rpartition(b")")[2].split()[:4]
            if state == b"Z" or own not in (int(parent), int(session)):
                continue
            words = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ")
        except (FileNotFoundError, ProcessLookupError):
            continue
        command = words.decode(errors="replace").strip()
        table[int(entry)] = (int(parent), int(session), command)
    return table


def _process_table_of_ps() -> dict[int, tuple[int, int, str]]:
    table = {}
    listing = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat=,command="], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        pid, parent, state, command = line.split(maxsplit=3)
        if not state.startswith("Z") and "ps -axo" not in command:
            table[int(pid)] = (int(parent), 0, command)
    return table
