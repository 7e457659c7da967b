"""What a rank does from its fork to its end: it runs the body in a process group, and reports.

It takes the surroundings of the test on first. About its peers the pytest process decides.
"""

import ctypes
import faulthandler
import os
import pickle
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from ddp_kit.testing import pytest_parts
from ddp_kit.testing.job import Files, Job, Stand
from ddp_kit.testing.leaks import leaks_since, take_stock
from ddp_kit.testing.report import RankReport

if TYPE_CHECKING:
    from ddp_kit.distributed.process_group import Group

PR_SET_PDEATHSIG = 1
STACKS = signal.SIGQUIT  # not one that training code handles
# gloo's timeout exceeds the test's deadline by this, so that the deadline comes first and shows all
# stacks.
SPARE_S = 60
_group: "ContextVar[Group]" = ContextVar("group")


def current_group() -> "Group":
    """Returns this rank's ddp_kit Group, inside the body of a test that runs on ranks.

    Raises: RuntimeError elsewhere.
    """
    try:
        return _group.get()
    except LookupError:
        raise RuntimeError(
            "there is no group here: current_group() works in a test marked @pytest.mark.ranks(n), "
            "or in run_ranks"
        ) from None


def run_rank(folder: Path, *, rank: int, config: pytest.Config) -> NoReturn:
    """Runs a job as one of its ranks, in the freshly forked process, and ends it."""
    files = Files(folder)
    # Ctrl-C goes to pytest alone, and the rank's children can be found and killed with it.
    os.setsid()
    if sys.platform == "linux":
        # Should the server be killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _redirect(files.output(rank))
    with files.stacks(rank).open("w") as stacks:
        faulthandler.enable(stacks)
        faulthandler.register(STACKS, file=stacks, all_threads=True)
        job: Job = pickle.loads(files.job.read_bytes())
        report = _live(job, rank=rank, store=files.store, config=config)
        files.write_report(report)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(report.exit_code)  # no shutdown of what was inherited from the server


def _redirect(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The server's streams are files.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _live(job: Job, *, rank: int, store: Path, config: pytest.Config) -> RankReport:
    common: dict[str, Any] = {"rank": rank, "pid": os.getpid()}
    try:
        value = _surrounded(job, rank=rank, store=store, config=config)
        return RankReport(**common, outcome="passed", value=pickle.dumps(value))
    except (pytest.skip.Exception, pytest.xfail.Exception) as error:
        outcome = "skipped" if isinstance(error, pytest.skip.Exception) else "xfailed"
        return RankReport(**common, outcome=outcome, time=time.monotonic(), message=str(error.msg))
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            return RankReport(**common, outcome="passed", value=pickle.dumps(None))
        return _failure(error, common=common, config=config)


def _failure(error: BaseException, *, common: dict[str, Any], config: pytest.Config) -> RankReport:
    from ddp_kit.distributed.failures import is_lost_peer

    now = time.monotonic()
    text, path, line = pytest_parts.traceback_of(error, config=config)
    code = 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        code = error.code
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, pytest.fail.Exception | _LeakError):
        message = str(error)
    report = RankReport(
        **common,
        outcome="failed",
        time=getattr(error, "_ddp_kit_time", now),
        exit_code=code,
        message=message,
        traceback=text,
        where=(path, line),
        is_echo=is_lost_peer(error),
    )
    if isinstance(error, WITHOUT_PLACE):
        return replace(report, traceback="", where=None)
    return report


class _LeakError(Exception):
    """The body passed and left something behind."""


# No line of the test is where these were raised.
WITHOUT_PLACE = (
    _LeakError,
    pytest.PytestUnhandledThreadExceptionWarning,
    pytest.PytestUnraisableExceptionWarning,
)


def _surrounded(job: Job, *, rank: int, store: Path, config: pytest.Config) -> object:
    """Runs the body in the state of the pytest process, and returns its value."""
    os.environ.clear()
    os.environ.update(job.variables_of(rank))
    os.chdir(job.folder)
    sys.path[:] = job.path
    sys.argv[:] = job.argv
    with pytest_parts.as_pytest(config, files=job.modules, options=job.options):
        function, args, kwargs = pickle.loads(job.call)
        _apply_filters(pickle.loads(job.filters))
        with _faults_are_warnings():
            before = take_stock()
            value = _in_group(job, store=store, call=lambda: _call(function, args, kwargs))
            leaks = leaks_since(before)
            if leaks:
                raise _LeakError("\n".join(leaks))
    return value


def _in_group(job: Job, *, store: Path, call: Callable[[], object]) -> object:
    if not job.has_group:
        return call()
    from ddp_kit.distributed.process_group import process_group

    timeout_s = job.deadline_s + SPARE_S
    with process_group(
        device="cpu", init_method=f"file://{store}", first_timeout_s=timeout_s, timeout_s=timeout_s
    ) as group:
        token = _group.set(group)
        try:
            return call()
        except BaseException as error:
            # Leaving the group takes time, and which rank failed first is told by this moment.
            error._ddp_kit_time = time.monotonic()  # type: ignore[attr-defined]
            raise
        finally:
            _group.reset(token)


def _call(
    function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]
) -> object:
    with ExitStack() as stack:
        made: dict[str, Callable[[], object]] = {
            "group": current_group,
            "monkeypatch": lambda: stack.enter_context(pytest.MonkeyPatch.context()),
        }
        own = dict(kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Stand):
                own[name] = made[value.name]()
        return function(*args, **own)


def _apply_filters(filters: list[tuple[str, Any, type[Warning], Any, int]]) -> None:
    """Installs the warning filters that were in force around the test in the pytest process."""

    def text(pattern: re.Pattern[str] | str | None) -> str:
        if isinstance(pattern, re.Pattern):
            return pattern.pattern
        return pattern or ""

    warnings.resetwarnings()
    for action, message, category, module, line in filters:
        literal: Any = action
        warnings.filterwarnings(literal, text(message), category, text(module), line, append=True)


@contextmanager
def _faults_are_warnings() -> Iterator[None]:
    """Turns exceptions in threads and in `__del__` into pytest's warnings.

    These are errors where the user's filters say so.
    """
    faults: list[tuple[type[Warning], str]] = []

    def in_thread(fault: threading.ExceptHookArgs) -> None:
        name = fault.thread.name if fault.thread else "?"
        text = f"in thread {name!r}: {fault.exc_type.__name__}: {fault.exc_value}"
        faults.append((pytest.PytestUnhandledThreadExceptionWarning, text))
        threading.__excepthook__(fault)

    def unraisable(fault: "sys.UnraisableHookArgs") -> None:
        text = f"{fault.err_msg or 'ignored'} {fault.object!r}: {fault.exc_value!r}"
        faults.append((pytest.PytestUnraisableExceptionWarning, text))
        sys.__unraisablehook__(fault)

    threading.excepthook = in_thread
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        threading.excepthook = threading.__excepthook__
        sys.unraisablehook = sys.__unraisablehook__
    for category, message in faults:
        warnings.warn(category(message), stacklevel=1)
