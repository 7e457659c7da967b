"""Does a changed tree still do the same? Records bits, files and texts of some 200 commands, and compares those of another tree.

    python benchmarks/same_bits.py record FOLDER --data-root data     # before the change
    python benchmarks/same_bits.py compare FOLDER --data-root data    # after it: a table; exit code 1 if anything differs

FOLDER holds one JSON file a command, for reading and for diff, and under kept/ the run directories from which both trees go on: so an
old checkpoint is read by new code. Everything goes through the command line. What differs from one start to the next is replaced:
times, rates, ports, process ids, temporary paths. Records hold for one machine and one set of installed packages.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

from same_bits_cases import DATA, Case, proper_uses
from same_bits_mistakes import FILES, mistakes
from same_bits_ranks import train

ROOT = Path(__file__).parents[1]
LIMIT_S = 300
SHOWN = 30  # lines of a difference
TIMINGS = ("samples_per_s", "data_wait", "peak_memory_mib", "mfu", "tflops")
# a cluster's clients, so that plans are the same with SLURM and without
CLIENTS = {
    "sinfo": "echo 'gpu*|1-00:00:00|8|gpu:8'",
    "sbatch": "exit 0",
    "squeue": "exit 0",
    "srun": "exit 0",
    "scancel": "exit 0",
    "scontrol": "exit 0",
}

# lines that are there or not as processes happen to run
CHANCE = re.compile(
    "|".join(
        [
            r"step \d",
            r"a stop needs up to",
            r"waiting for another process",
            r"decoded \d",
            r"\[W\d",
            r"\[rank\d+\]:\[W",
        ]
    )
)
# frames of the library in a traceback: lines move, and the names of files and functions with them
FRAME = re.compile(
    r'^\s*File "(<(root|venv|python)>[^"]*|<frozen [^"]*)", line \d+, in .*\n'
    r"(\s+.*\n)*?(?=\s*File |\S)",
    re.MULTILINE,
)
REPLACED = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([.,]\d+)?(Z|[+-]\d\d:?\d\d)?"), "<time>"),
    (re.compile(r"\b20\d{6}-\d{6}(-\d+)?\b"), "<time>"),
    (re.compile(r"\b1[789]\d{8}\.\d+\b"), "<time>"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "<clock>"),
    (re.compile(r"\bpid \d+"), "pid <pid>"),
    (re.compile(r"\b(port |127\.0\.0\.1:|localhost:)\d{4,5}\b"), r"\1<port>"),
    (re.compile(r"\b0x[0-9a-f]+\b"), "<address>"),
    (re.compile(r"[\d.,]+ samples/s"), "<rate> samples/s"),
    (re.compile(r"\b\d+(\.\d+)? (ms|s)(?![\w/])"), r"<duration> \2"),
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where cases run: `temporary` is theirs, `kept` holds the run directories to go on from, `data_root` the data."""

    temporary: Path
    kept: Path
    data_root: Path

    def environment(self) -> dict[str, str]:
        """Returns what a case's command sees; nothing of the caller's but its language."""
        return {
            "PATH": f"{self.temporary / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.temporary / "home"),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }

    def prepare(self) -> None:
        """Makes the home folder and the cluster's clients; this process's own environment becomes that of the cases."""
        os.environ.clear()
        os.environ.update(self.environment())
        (self.temporary / "home").mkdir()
        (self.temporary / "bin").mkdir()
        for name, line in CLIENTS.items():
            client = self.temporary / "bin" / name
            client.write_text(f"#!/bin/sh\n{line}\n")
            client.chmod(0o755)

    def names(self, folder: Path) -> dict[str, str]:
        """Returns paths and what stands for them in a record, the longest first."""
        names = {
            str(folder): "<case>",
            str(self.temporary): "<temporary>",
            str(self.data_root): DATA,
            sys.prefix: "<venv>",
            str(ROOT): "<root>",
            sys.base_prefix: "<python>",
        }
        return dict(sorted(names.items(), key=lambda item: -len(item[0])))


def normalised(text: str, names: dict[str, str]) -> list[str]:
    """Returns a command's text as lines, without what differs from one start to the next."""
    for path, word in names.items():
        text = text.replace(path, word)
    text = re.sub(rf"\b{re.escape(socket.gethostname())}\b", "<host>", text)
    text = FRAME.sub("", text)
    for pattern, word in REPLACED:
        text = pattern.sub(word, text)
    return [line.rstrip() for line in text.splitlines() if not CHANCE.match(line)]


def json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(case: Case, folder: Path, place: Place) -> tuple[list[int], str, str]:
    """Runs a case's command in its folder. Returns exit codes, stdout and stderr; every process of it has ended."""
    words = [str(place.data_root) if word == DATA else word for word in case.words[1:]]
    environ = place.environment() | case.env
    if case.words[0] == "train":
        texts = folder.with_name(folder.name + "-texts")
        return train(words, ranks=case.ranks, folder=folder, environ=environ, texts=texts, limit_s=LIMIT_S)
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(case.words[0])), *words],
        cwd=folder,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
    return [process.returncode], out, err


def left_by(folder: Path, names: dict[str, str], given: set[Path]) -> dict[str, Any]:
    """Returns what a command left: names of files, hashes of tensors, and what run directories say in numbers and words."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path not in given and path.suffix != ".pyc"]
    left: dict[str, Any] = {"files": normalised("\n".join(str(path.relative_to(folder)) for path in files), names)}
    tensors = [path for path in files if path.suffix == ".safetensors"]
    left["tensors"] = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in tensors}
    for status in folder.glob("*/status.json"):
        found = json.loads(status.read_text())
        found["reason"] = normalised(str(found.get("reason", "")), names)
        left["status"] = found
        left["settings"] = json.loads(status.with_name("settings.json").read_text())["settings"]
        records = json_lines(status.with_name("metrics.jsonl"))
        kept = [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]
        left["metrics"] = [json.dumps(record) for record in kept]
        events = json_lines(status.with_name("events.jsonl"))
        left["events"] = [f"{event['event']} at step {event.get('step')}" for event in events if event["event"] != "grace"]
    return left


def file_name(name: str) -> str:
    """Returns what a case's record and folder are called."""
    return re.sub(r"[^\w]+", "-", name)


def run(case: Case, place: Place, *, keeps: bool) -> dict[str, Any]:
    """Runs a case in a folder of its own. Returns its record; `keeps`: its run directory stays in `place.kept`."""
    folder = place.temporary / file_name(case.name)
    folder.mkdir()
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__", "pictures"))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    given = set(folder.rglob("*"))
    if case.kept:
        shutil.copytree(place.kept / file_name(case.kept), folder / "run")
    codes, out, err = start(case, folder, place)
    names = place.names(folder)
    record = {"command": " ".join(case.words), "exit_codes": codes}
    record["stdout"] = normalised(out, names)
    record["stderr"] = normalised(err, names)
    record |= left_by(folder, names, given)
    if keeps and case.is_kept:
        shutil.copytree(folder / "run", place.kept / file_name(case.name), dirs_exist_ok=True)
    shutil.rmtree(folder)
    return record


def run_all(cases: Iterable[Case], place: Place, *, keeps: bool) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields cases with their records, in order; as many at a time as have a core for each process."""
    cores = len(os.sched_getaffinity(0))
    for (ranks, _), group in groupby(cases, key=lambda case: (case.ranks, bool(case.kept))):
        alike = list(group)
        with ThreadPoolExecutor(max(1, cores // ranks)) as pool:
            records = pool.map(lambda case: run(case, place, keeps=keeps), alike)
            yield from zip(alike, records, strict=True)


def text_of(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def record(cases: list[Case], folder: Path, place: Place) -> int:
    for case, found in run_all(cases, place, keeps=True):
        (folder / f"{file_name(case.name)}.json").write_text(text_of(found))
        print(f"{case.name:60} {found['exit_codes']}", flush=True)
    return 0


def compare(cases: list[Case], folder: Path, place: Place) -> int:
    """Prints a line a case, and the first lines of what differs. Returns 1 if anything does."""
    differing = []
    for case, found in run_all(cases, place, keeps=False):
        before = folder / f"{file_name(case.name)}.json"
        old = before.read_text() if before.exists() else ""
        lines = list(difflib.unified_diff(old.splitlines(), text_of(found).splitlines(), "before", "after", n=1, lineterm=""))
        print(f"{case.name:60} {'differs' if lines else 'same'}", flush=True)
        if lines:
            differing.append(case.name)
            print("\n".join(f"    {line[:300]}" for line in lines[:SHOWN]))
    print(f"{len(cases) - len(differing)} of {len(cases)} are the same")
    return 1 if differing else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of cases: 'run/digits*'")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of CIFAR-10, MNIST and tinyshakespeare.txt")
    given = parser.parse_args()
    cases = [case for case in [*proper_uses(), *mistakes()] if fnmatch(case.name, given.only)]
    if not cases:
        parser.error(f"--only {given.only}: no case has such a name")
    if not (given.data_root / "tinyshakespeare.txt").exists():
        parser.error(f"--data-root {given.data_root}: expected a folder with tinyshakespeare.txt, cifar10/ and MNIST/raw")
    kept = given.folder / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    verb = {"record": record, "compare": compare}[given.verb]
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        place = Place(temporary=Path(temporary), kept=kept, data_root=given.data_root.resolve())
        place.prepare()
        return verb(cases, given.folder, place)


if __name__ == "__main__":
    sys.exit(main())
