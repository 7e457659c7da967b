"""`ddp-kit logs RUN [--rank K] [-f]`: what a run has said, over all that it was started again."""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence

from ddp_kit.io.tables import printable
from ddp_kit.launch.plan import LaunchError
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.runs.log_lines import Line, Reader, merged, rank_logs
from ddp_kit.launch.runs.lookup import find
from ddp_kit.launch.verbs import verb

POLL_S = 0.5
# Between two looks at whether a run is over; it is when two say so, since torchrun may begin its
# ranks anew.
ASK_S = 4.0


@verb("logs")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: 0, or 2 if there is no such run."""
    asked = _parser().parse_args(argv)
    run = find(asked.run)
    reader = Reader(run, rank=asked.rank)
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        if not _print(reader.added()):
            print(_nothing(run, rank=asked.rank), file=sys.stderr, flush=True)
        if asked.follow:
            _follow(reader)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "ddp-kit logs", description="What a run has said, over all its lives.", allow_abbrev=False
    )
    parser.add_argument("run", help="its folder or a job id")
    parser.add_argument("--rank", type=int, metavar="K", help="only that rank's")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on with what is added, until the run is over or Ctrl-C",
    )
    return parser


def _print(lines: Sequence[Line]) -> bool:
    """Prints lines by their time. Returns: whether there were any."""
    for line in merged(lines):
        print(printable(line, kept="\t"), flush=True)
    return bool(lines)


def _follow(reader: Reader) -> None:
    """Prints what is added until the run is over, its last words too."""
    looks = 0
    looked = time.monotonic()
    while looks < 2:
        time.sleep(POLL_S)
        if time.monotonic() - looked >= ASK_S:
            looks = looks + 1 if reader.run.is_over() else 0
            looked = time.monotonic()
        _print(reader.added())


def _nothing(run: FoundRun, *, rank: int | None) -> str:
    """Returns why there are no lines yet.

    Raises: LaunchError if the run has ranks, but not that one.
    """
    ranks = sorted(rank_logs(run))
    if rank is not None and ranks and rank not in ranks:
        raise LaunchError(f"--rank {rank}: the run has ranks {ranks[0]} to {ranks[-1]}.")
    waiting = [f" Job {job.id} waits: {job.reason}." for job in run.jobs() if job.is_waiting]
    return f"{run.folder}: nothing has been said yet.{''.join(waiting)}"


if __name__ == "__main__":
    sys.exit(main())
