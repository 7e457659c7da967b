"""What every command has around its work: the ranks' group, the arithmetic, and saying once what
failed.

Exit codes are decided here, and which rank speaks on stderr; what a command does is its own.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ddp_kit.distributed.failure import Failure
from ddp_kit.distributed.process_group import Group, process_group
from ddp_kit.distributed.pulse import Limits
from ddp_kit.distributed.topology import is_first_rank
from ddp_kit.errors import ConfigError, DdpKitError
from ddp_kit.io.logs import logger, without_secrets
from ddp_kit.io.redact import redact_text
from ddp_kit.settings import Settings
from ddp_kit.strategies.precision import arithmetic, deterministic
from ddp_kit.watchdog.watch import watch

OTHERS_SPEAK_S = 5.0  # a busy machine starts the first rank that much later than the others
HANG = 124  # as `timeout` of coreutils has it
INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
OnFailure = Callable[[Failure], None]


@contextmanager
def session(
    settings: Settings,
    *,
    speaks: bool = True,
    on_failure: OnFailure | None = None,
    after_failure: OnFailure | None = None,
    run_dir: Path | None = None,
) -> Iterator[Group]:
    """Enters the group that the settings ask for. Every rank calls it. A node check leaves its
    findings in `run_dir`.

    On an error each rank finds out who the culprit is, `on_failure(failure)` may write it down, and
    with `speaks` the culprit's message goes to stderr, first and once, and the error becomes a
    SystemExit with its exit code. `after_failure(failure)` does what may take its time.
    """
    # A convolution's gradient has other bits on two threads than on one.
    threads = settings.threads or int(settings.exact)
    with process_group(
        device=settings.device, threads=threads, tuning=settings.tuning, run_dir=run_dir
    ) as group:
        group.pulse.limits = _limits(settings)
        watch(group)
        try:
            with (
                arithmetic(settings.precision, group.device),
                deterministic(settings.exact, group.device),
            ):
                yield group
        except BaseException as error:
            failure = group.failure_report.find_culprit(error)
            text = failure.words()
            logger.debug("%s", redact_text(text or failure.reason))
            if on_failure is not None:
                on_failure(failure)
            if speaks:
                sys.stdout.flush()
                sys.stderr.write(without_secrets(text))
                sys.stderr.flush()
            if after_failure is not None:
                after_failure(failure)
            if not speaks or isinstance(error, SystemExit):
                raise
            raise SystemExit(code_of(failure)) from error


def _limits(settings: Settings) -> Limits:
    """Returns the time that each phase has."""
    hang = settings.hang
    return Limits(
        step=settings.hang_timeout,
        start=hang.start,
        first_step=hang.first_step,
        callback=hang.callback,
        evaluation=hang.evaluation,
        save=hang.save,
        end=hang.end,
        compiles=settings.compile,
        is_on=hang.enabled,
    )


def exit_code(error: BaseException) -> int:
    """Returns the exit code of a failure: 2 usage, 130 SIGINT, a SystemExit's own, else 1."""
    if isinstance(error, SystemExit):
        if error.code is None:
            return 0
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, DdpKitError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 1


def code_of(failure: Failure) -> int:
    """Returns the exit code of a rank: 124 where nothing moved any more, else its error's."""
    if failure.is_hang:
        return HANG
    return exit_code(failure.error)


def run_command(command: Callable[[], int]) -> int:
    """Runs a command. Returns its exit code; what is refused before the group is entered is said
    here, once if all ranks are refused.

    Only the first rank speaks at once. Where all are refused the launcher ends the others
    meanwhile; where it does not, they speak too.
    """
    try:
        return command()
    except DdpKitError as error:
        if not is_first_rank():
            time.sleep(OTHERS_SPEAK_S)
        sys.stderr.write(f"{without_secrets(str(error))}\n")
        return error.exit_code
    except SystemExit as end:
        return exit_code(end)


def recipe_path(args: Sequence[str], *, command: str) -> str:
    """Returns the recipe of a command line. Raises: ConfigError with the usage if there is none;
    SystemExit after `--help`.
    """
    if args and not args[0].startswith("-"):
        return args[0]
    usage = (
        f"usage: {command} RECIPE.py [--field value ...]\n"
        f"       {command} RECIPE.py --help lists the recipe's flags"
    )
    if args and args[0] in ("-h", "--help"):
        if is_first_rank():
            print(usage)
        raise SystemExit(0)
    raise ConfigError(f"the recipe comes first.\n{usage}")
