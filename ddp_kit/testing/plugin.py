"""The pytest plugin: test bodies on real gloo ranks, and fixtures that catch what a test leaves.

Sessions without such tests start as if the plugin were not there: it does not import torch.
"""

import inspect
from collections.abc import Generator, Iterator
from contextvars import Token
from typing import TYPE_CHECKING, Any

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr
from _pytest._io import TerminalWriter

from ddp_kit.testing.job import Body, Job, Stand, pack
from ddp_kit.testing.leaks import leaks_since, take_stock
from ddp_kit.testing.pool import IMPORTED_ONCE, Pool
from ddp_kit.testing.ranks import GRACE_S, Ranks
from ddp_kit.testing.report import RanksError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PARAMETER = "_ranks_world_size"
# As the entry point has it, and as `-p` and `pytest_plugins` have it.
NAMES = ("ddp_kit", "ddp_kit.testing.plugin")
Owner = tuple[Pool, Token[Pool]]
owned = pytest.StashKey[Owner]()
MARKER = (
    "ranks(world_size, ..., deadline_s=60): run the test on so many gloo processes; "
    "with several sizes, once for each."
)


def pytest_plugin_registered(plugin: object, manager: pytest.PytestPluginManager) -> None:
    """Blocks this plugin's other name: one module registered under two names is an error."""
    own = manager.get_name(plugin)
    if own in NAMES and getattr(plugin, "MARKER", None) is MARKER:
        manager.set_blocked(NAMES[1 - NAMES.index(own)])


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the ini option for heavy modules that the tests on ranks use."""
    parser.addini(
        "ranks_preload",
        type="linelist",
        default=[],
        help="modules that the server of ranks imports once (fork-safe ones)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the session's pool, whose server starts when a test needs it.

    A session inside a session (pytester) shares the outer one's.
    """
    config.addinivalue_line("markers", MARKER)
    if Pool.current.get(None) is None:
        pool = Pool(imports=(*IMPORTED_ONCE, *config.getini("ranks_preload")))
        config.stash[owned] = pool, Pool.current.set(pool)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the pool with the session that made it."""
    owner = config.stash.get(owned, None)
    if owner is not None:
        pool, token = owner
        pool.close()
        Pool.current.reset(token)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test for each world size where the marker has several."""
    sizes, _ = _ranks(metafunc.definition)
    if len(sizes) > 1:
        metafunc.fixturenames.append(PARAMETER)
        metafunc.parametrize(
            PARAMETER, sizes, ids=[f"ranks={size}" for size in sizes], indirect=True
        )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts importing torch in the server while the first tests run, if any test needs it."""
    if session.config.option.collectonly:
        return
    if any(item.get_closest_marker("ranks") for item in session.items):
        Pool.current.get().warm_up()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Refuses tests that could not run on ranks and would silently run without."""
    if item.get_closest_marker("ranks") is None:
        return
    function = getattr(item, "function", None)
    if type(item) is not pytest.Function or inspect.iscoroutinefunction(function):
        pytest.fail(
            "@pytest.mark.ranks needs a plain test function or method, "
            "not a coroutine or a unittest.TestCase",
            pytrace=False,
        )


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Runs the body on ranks in place of here, if the test is marked so."""
    sizes, deadline_s = _ranks(pyfuncitem)
    if not sizes:
        return None
    with Ranks(_job(pyfuncitem, sizes=sizes, deadline_s=deadline_s)) as ranks:
        reports = ranks.wait(grace_s=GRACE_S)
    for report in reports:
        if report.output:
            pyfuncitem.add_report_section("call", f"output of rank {report.rank}", report.output)
            if pyfuncitem.config.option.capture == "no":
                print(f"\n[rank {report.rank}]\n{report.output}", end="")
    outcomes = {report.outcome for report in reports}
    if outcomes == {"skipped"}:
        pytest.skip(reports[0].message)
    if outcomes == {"xfailed"}:
        pytest.xfail(reports[0].message)
    if outcomes != {"passed"}:
        raise RanksError(reports, deadline_s=deadline_s)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Shows the ranks' own tracebacks in place of the plugin's."""
    report = yield
    if call.excinfo is None or item.get_closest_marker("ranks") is None:
        return report
    error = call.excinfo.value
    if isinstance(error, RanksError):
        report.longrepr = _RanksRepr(error, item=item)
    return report


class _RanksRepr(TerminalRepr):
    """The merged report, coloured as pytest colours its own, and the line for the summary."""

    def __init__(self, error: RanksError, *, item: pytest.Item) -> None:
        path, line, _ = item.location
        where = (path, (line or 0) + 1)
        if error.first_failed and error.first_failed.where:
            where = error.first_failed.where
        self.reprcrash = ReprFileLocation(*where, error.headline)
        self.text = error.merged

    def toterminal(self, tw: TerminalWriter) -> None:
        for line in self.text.splitlines():
            is_error = line.startswith("E ")
            tw.line(line, red=is_error, bold=is_error)


def _ranks(node: pytest.Item) -> tuple[tuple[int, ...], float]:
    """Returns the marker's world sizes and deadline in seconds; no sizes without a marker.

    Once a test is parametrised it has one size.

    Raises: pytest.UsageError if the marker is not as documented.
    """
    marker = node.get_closest_marker("ranks")
    if marker is None:
        return (), 0.0
    deadline_s = marker.kwargs.get("deadline_s", 60)
    is_whole = bool(marker.args) and all(type(size) is int and size > 0 for size in marker.args)
    if not is_whole or set(marker.kwargs) - {"deadline_s"} or not deadline_s > 0:
        words = [repr(size) for size in marker.args]
        words += [f"{name}={value!r}" for name, value in marker.kwargs.items()]
        raise pytest.UsageError(
            f"{node.nodeid}: ranks({', '.join(words)}): expected ranks(2) or ranks(1, 2, 4), "
            "and at most deadline_s=60 beside."
        )
    sizes = marker.args
    if hasattr(node, "callspec") and PARAMETER in node.callspec.params:
        sizes = (node.callspec.params[PARAMETER],)
    return sizes, float(deadline_s)


def _job(item: pytest.Function, *, sizes: tuple[int, ...], deadline_s: float) -> Job:
    names = inspect.signature(item.obj).parameters
    arguments = {name: item.funcargs[name] for name in names if name in item.funcargs}
    if isinstance(arguments.get("monkeypatch"), pytest.MonkeyPatch):
        arguments["monkeypatch"] = Stand("monkeypatch")
    owner = f"{item.cls.__qualname__}." if item.cls else ""
    option: Any = item.config.option
    return Job(
        call=pack(Body(item.module.__name__, owner + item.originalname), **arguments),
        world_size=sizes[0],
        has_group=True,
        deadline_s=deadline_s,
        options={name: getattr(option, name) for name in ("verbose", "tbstyle", "showlocals")},
    )


@pytest.fixture(name=PARAMETER)
def _world_size(request: pytest.FixtureRequest) -> int:
    size: int = request.param
    return size


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Stand:
    """The rank's ddp_kit Group, in the body of a test marked `ranks`.

    Fixtures, which run in the pytest process, see a placeholder.
    """
    if request.node.get_closest_marker("ranks") is None:
        pytest.fail(
            "the fixture `group` needs @pytest.mark.ranks(n) on the test; "
            "without ranks take `one_process_group`",
            pytrace=False,
        )
    return Stand("group")


@pytest.fixture
def one_process_group() -> "Iterator[ProcessGroup]":
    """A gloo group of the pytest process alone: the default group during the test."""
    import torch.distributed as dist

    # torch.distributed has it too, but not for type checkers.
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails the test if it leaves threads, child processes, process groups, variables or files.

    Files are those in the working directory.
    """
    before = take_stock()
    yield
    leaks = leaks_since(before)
    if leaks:
        pytest.fail("\n".join(leaks), pytrace=False)
