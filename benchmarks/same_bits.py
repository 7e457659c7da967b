"""Does a changed tree still do the same? Records what 200 commands leave and say.

    python benchmarks/same_bits.py record FOLDER --data-root data     # before the change
    python benchmarks/same_bits.py compare FOLDER --data-root data    # after it

The exit code of `compare` is 1 if something differs. FOLDER holds one JSON file a command, to be
read and compared, and under kept/ the run directories from which both trees go on: so old
checkpoints are read by new code, which refuses them where a recipe's text has changed. Everything
goes through the command line. What differs from one start to the next is replaced: times, rates,
ports, process ids, temporary paths. A record holds for one machine and one set of installed
packages.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
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
from same_bits_text import normalised

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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folders: `temporary` is where cases run, `kept` holds the run directories to go on from."""

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
        """Makes the home folder and the cluster's clients, and takes on the cases' environment."""
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


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns a file's objects; none if it is not there."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(case: Case, folder: Path, place: Place) -> tuple[list[int], str, str]:
    """Runs a case's command in its folder. Returns exit codes, stdout and stderr."""
    words = [str(place.data_root) if word == DATA else word for word in case.words[1:]]
    environ = place.environment() | case.env
    if case.words[0] == "train":
        texts = folder.with_name(folder.name + "-texts")
        return train(
            words,
            ranks=case.ranks,
            folder=folder,
            environ=environ,
            texts=texts,
            limit_s=LIMIT_S,
        )
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
    """Returns what a command left: names of files, hashes of tensors, and what its run says."""
    files = []
    tensors = {}
    for path in sorted(folder.rglob("*")):
        if path in given or not path.is_file() or path.suffix == ".pyc":
            continue
        name = str(path.relative_to(folder))
        files.append(name)
        if path.suffix == ".safetensors":
            tensors[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    left = {"files": normalised("\n".join(files), names), "tensors": tensors}
    for status in folder.glob("*/status.json"):
        left |= said_by(status.parent, names)
    return left


def said_by(run_dir: Path, names: dict[str, str]) -> dict[str, Any]:
    """Returns what a run directory says: status, settings, records to the last bit, events."""
    status = json.loads((run_dir / "status.json").read_text())
    status["reason"] = normalised(str(status.get("reason", "")), names)
    settings = json.loads((run_dir / "settings.json").read_text())["settings"]
    metrics = []
    for record in json_lines(run_dir / "metrics.jsonl"):
        for timing in TIMINGS:
            record.pop(timing, None)
        metrics.append(json.dumps(record))
    # when a stop's need is told depends on when the first save is on disk
    told = [event for event in json_lines(run_dir / "events.jsonl") if event["event"] != "grace"]
    events = [f"{event['event']} at step {event.get('step')}" for event in told]
    return {"status": status, "settings": settings, "metrics": metrics, "events": events}


def file_name(name: str) -> str:
    """Returns what a case's record and folder are called."""
    return re.sub(r"[^\w]+", "-", name)


def run(case: Case, place: Place, *, keeps: bool) -> dict[str, Any]:
    """Runs a case in a folder of its own. Returns its record.

    `keeps`: the run directory of a case that others go on from stays in `place.kept`.
    """
    folder = place.temporary / file_name(case.name)
    folder.mkdir()
    needless = shutil.ignore_patterns("__pycache__", "pictures")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=needless)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    given = set(folder.rglob("*"))
    if case.kept:
        kept = place.kept / file_name(case.kept)
        if not kept.exists():
            raise SystemExit(f"{kept} is not there: record {case.kept!r} first.")
        shutil.copytree(kept, folder / "run")
    codes, out, err = start(case, folder, place)
    names = place.names(folder)
    record = {"command": " ".join(case.words), "exit_codes": codes}
    record["stdout"] = normalised(out, names)
    record["stderr"] = normalised(err, names)
    record |= left_by(folder, names, given)
    if keeps and case.is_kept and (folder / "run").exists():
        shutil.copytree(folder / "run", place.kept / file_name(case.name), dirs_exist_ok=True)
    shutil.rmtree(folder)
    return record


def run_all(
    cases: Iterable[Case], place: Place, *, keeps: bool
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Yields cases with their records, in order; as many at a time as have a core a process."""
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
        old = before.read_text().splitlines() if before.exists() else []
        new = text_of(found).splitlines()
        lines = list(difflib.unified_diff(old, new, "before", "after", n=1, lineterm=""))
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
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="names of cases: 'run/digits*'"
    )
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), help="where all data sets are"
    )
    given = parser.parse_args()
    cases = [case for case in [*proper_uses(), *mistakes()] if fnmatch(case.name, given.only)]
    if not cases:
        parser.error(f"--only {given.only}: no case has such a name")
    if not (given.data_root / "tinyshakespeare.txt").exists():
        expected = "a folder with tinyshakespeare.txt, cifar10/ and MNIST/raw"
        parser.error(f"--data-root {given.data_root}: expected {expected}")
    kept = given.folder / "kept"
    kept.mkdir(parents=True, exist_ok=True)
    verb = {"record": record, "compare": compare}[given.verb]
    with tempfile.TemporaryDirectory(prefix="same-bits-") as temporary:
        place = Place(temporary=Path(temporary), kept=kept, data_root=given.data_root.resolve())
        place.prepare()
        return verb(cases, given.folder, place)


if __name__ == "__main__":
    sys.exit(main())
