"""`python -m ddp_kit.train RECIPE.py [--field value ...]`, and the same from Python as `run`.

What surrounds an attempt is here, from its flags to its exit code; the attempt itself is
`ddp_kit.lifecycle.run`.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ddp_kit.config.command_line import parse
from ddp_kit.config.secrets import secrets_of
from ddp_kit.config.validation import check
from ddp_kit.distributed.collectives import from_rank
from ddp_kit.distributed.topology import is_first_rank, read_topology
from ddp_kit.io.logs import hiding, patient_output
from ddp_kit.lifecycle.attempt import Attempt, Request
from ddp_kit.lifecycle.job_lives import JobLife
from ddp_kit.lifecycle.outcome import Outcome
from ddp_kit.lifecycle.run import train_attempt
from ddp_kit.lifecycle.run_dir import RunDir
from ddp_kit.lifecycle.session import recipe_path, run_command, session
from ddp_kit.lifecycle.start import default_path
from ddp_kit.recipe import Recipe, load_recipe
from ddp_kit.settings import Settings
from ddp_kit.stopping.departure import departing
from ddp_kit.stopping.signals import (
    REQUEUE,
    Stopped,
    is_restarted,
    leaves_with_agent,
    signals_noted,
)
from ddp_kit.stopping.stop_watcher import process_age_s


def run(recipe: Recipe, settings: Settings, *, name: str = "run") -> Outcome:
    """Trains a recipe. Every rank calls it; in a process that is no rank it trains alone.

    Returns: how the run ended, the same on every rank.
    Raises: ConfigError, DataError, NonFiniteError or whatever the recipe's own code raises; the run
        directory then says "failed".
    """
    check(settings)
    return _attempt(lambda: recipe, Request(settings=settings, name=name))


def _attempt(build: Callable[[], Recipe], request: Request) -> Outcome:
    """Enters the group and trains. A command (it has a `source`) says itself what failed.

    What is entered last is left first, and that order is the protocol. After a failure:

    1. `session` finds the culprit while the peers are still there, has the failure written into the
       run directory, says it, tells the trackers, and leaves the group;
    2. `stack` ends the stop watcher, closes the rank's log and releases the run directory: only
       now, so that no other attempt claims it before the failure is written;
    3. `_warnings_requeue` asks for another attempt, after everything else that is written there;
    4. the handlers of signals go, since a second signal must not cut off 1 to 3;
    5. secrets are hidden and output is patient until nothing is said any more.

    After a success `stack` is closed inside the group, before the ranks leave it together.
    """
    settings = request.settings
    path = Path(settings.run_dir) if settings.run_dir else default_path(request.name)
    with patient_output(), hiding(secrets_of(settings)), signals_noted() as stop:
        attempt = Attempt(request, stop, life=JobLife(path))
        with (
            departing(stop, pace=attempt.pace, tell=attempt.departed),
            _warnings_requeue(attempt, path),
            ExitStack() as stack,
            session(
                settings,
                speaks=request.source is not None,
                on_failure=attempt.failed,
                after_failure=attempt.after_failure,
                run_dir=path,
            ) as group,
        ):
            attempt.group = group
            try:
                outcome = train_attempt(build, attempt, group, stack)
                stack.close()
                # `srun` may end the others at the first exit code: nobody leaves before rank 0 is
                # done.
                from_rank(group, b"")
                return outcome
            except BaseException as error:
                # torchrun sends SIGTERM to the survivors of a rank: what failed is to be written
                # down first.
                stop.deferring = True
                stop.is_leaving = True
                attempt.life.require_progress_so_far(error)
                raise


@contextmanager
def _warnings_requeue(attempt: Attempt, path: Path) -> Iterator[None]:
    """After a warning before the first step, rank 0 asks for another attempt, also where there is
    no run directory yet, or no group. Raises: NoProgressError if that leads nowhere.
    """
    try:
        yield
    except Stopped as early:
        attempt.stop.deferring = True
        attempt.life.require_progress_so_far(early)
        if early.code == REQUEUE and is_first_rank():
            RunDir(path).ask_requeue(str(early))
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0 finished or stopped on request, 1 error, 2 usage, 75
    saved, please requeue, 130 SIGINT, 143 SIGTERM or SIGHUP; 0 also after a stop that torchrun's
    agent would take for a failure and undo.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    began = time.monotonic() - process_age_s()

    def command() -> int:
        path = recipe_path(args, command="python -m ddp_kit.train")
        topology = read_topology()
        leaves_with_agent(topology.launcher)
        source = load_recipe(path)
        settings = parse(
            source.settings, args[1:], prog=f"ddp_kit.train {args[0]}", rank=topology.rank
        )
        request = Request(
            settings=settings, name=source.name, source=source, args=args, began=began
        )
        outcome = _attempt(lambda: source.build(settings), request)
        return 0 if is_restarted() else outcome.exit_code

    with patient_output():
        return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
