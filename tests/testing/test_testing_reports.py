"""What the test kit reports of ranks that fail, hang, skip or leave something behind: each test runs a pytest session of its own."""

import os
import signal
import threading
import time

import pytest
import torch  # noqa: F401  # kept in this process: torch cannot be imported anew by each inner session


@pytest.fixture
def inner(pytester: pytest.Pytester):
    """Runs a test file in a pytest session of its own within this process, which shares the server of ranks."""

    def run(body: str, *options: str, **kwargs: bool) -> pytest.RunResult:
        head = "import os, subprocess, sys, threading, time, warnings\nimport pytest, torch\nimport torch.distributed as dist\n"
        pytester.makepyfile(head + body)
        return pytester.runpytest(
            "-p", "ddp_kit.testing.plugin", "-p", "no:cacheprovider", *options, **kwargs
        )

    return run


def test_no_leaks_watches_the_pytest_process(inner) -> None:
    result = inner("""
@pytest.fixture(autouse=True)
def always(no_leaks): pass

done = threading.Event()
def test_thread(): threading.Thread(target=done.wait, name="lingers").start()
def test_variable(): os.environ["LEFT_SET"] = "1"
def test_file(): open("left", "w").close()
def test_group(): dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
def test_clean(): done.set(); os.environ.pop("LEFT_SET"); dist.destroy_process_group(); os.remove("left")
""")
    result.assert_outcomes(passed=5, errors=4 + 1)
    names = [
        "*thread: 'lingers'",
        "*left set: LEFT_SET",
        "*working directory: left",
        "*process group: *(gloo)",
        "*left unset: LEFT_SET",
    ]
    result.stdout.fnmatch_lines(names)


def test_the_culprit_is_first_and_its_peers_have_a_line_each(inner) -> None:
    result = inner("""
@pytest.mark.ranks(2)
def test_one_fails(group):
    print("output of", group.rank)
    if group.rank == 1:
        time.sleep(0.2)
        assert [1, 2] == [1, 3]
    dist.all_reduce(torch.ones(1))
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "Rank 1 of 2 failed first: AssertionError: assert*",
            ">*assert [[]1, 2] == [[]1, 3]",
            "E*At index 1 diff: 2 != 3",
        ]
    )
    result.stdout.fnmatch_lines(
        ["  rank 0 failed: RuntimeError*closed by peer*", "output of 0", "output of 1"]
    )
    result.stdout.no_fnmatch_line("*ddp_kit/testing*")


def test_the_deadline_shows_where_every_rank_was(inner) -> None:
    result = inner("""
def waits_for_its_peer(): dist.all_reduce(torch.ones(1))
def is_elsewhere(): time.sleep(60)

@pytest.mark.ranks(2, deadline_s=1)
def test_hangs(group):
    waits_for_its_peer() if group.rank == 0 else is_elsewhere()
""")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "Not done after 1 s*",
            "Stacks of rank 0*",
            "*in waits_for_its_peer",
            "Stacks of rank 1*",
            "*in is_elsewhere",
        ]
    )


def test_what_a_body_leaves_behind_fails_it_by_name(inner) -> None:
    result = inner("""
@pytest.mark.ranks(1)
def test_thread():
    for daemon in (True, False):
        threading.Thread(target=time.sleep, args=(60,), daemon=daemon, name=f"lingers-{daemon}").start()

@pytest.mark.ranks(1)
def test_process(): subprocess.Popen(["sleep", "61"])

@pytest.mark.ranks(1)
def test_variable(): os.environ["LEFT_SET"] = "secret"

@pytest.mark.ranks(1)
def test_file(): open("left", "w").close()
""")
    result.assert_outcomes(failed=4)
    for line in (
        "thread: 'lingers-False'",
        "thread: 'lingers-True' (daemon)",
        "process: pid *: sleep 61",
        "variable left set: LEFT_SET",
    ):
        result.stdout.fnmatch_lines([f"*{line}"])
    result.stdout.fnmatch_lines(["*file left in the working directory: left"])
    result.stdout.no_fnmatch_line("*secret*")


def test_skip_and_xfail_in_a_body_are_those_of_the_test(inner) -> None:
    result = inner(
        """
@pytest.mark.ranks(2)
def test_skips(): pytest.skip("not today")
@pytest.mark.ranks(2)
def test_xfails(): pytest.xfail("known")
@pytest.mark.ranks(2)
def test_one_skips(group):
    if group.rank == 0: pytest.skip("alone")
""",
        "-rs",
    )
    result.assert_outcomes(skipped=1, xfailed=1, failed=1)
    result.stdout.fnmatch_lines(["Rank 0 of 2 was skipped (alone)*", "SKIPPED*not today"])


def test_an_interrupted_session_ends_its_ranks(inner, pytester: pytest.Pytester) -> None:
    def interrupt() -> None:
        while not (files := list(pytester.path.glob("pid-*"))) or not files[0].read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell without job control starts what is in its background deaf to it
    thread.start()
    result = inner(
        """
@pytest.mark.ranks(1)
def test_sleeps(tmp_path):
    open(f"pid-{os.getpid()}", "w").write("here")
    time.sleep(60)
""",
        no_reraise_ctrlc=True,
    )
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    (file,) = pytester.path.glob("pid-*")
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.name.removeprefix("pid-")), 0)


def test_misuse_is_refused_with_what_to_do(inner) -> None:
    result = inner("""
import unittest

@pytest.mark.ranks(1)
def test_capsys(capsys): pass
@pytest.mark.ranks(1)
async def test_coroutine(): pass
class TestOld(unittest.TestCase):
    @pytest.mark.ranks(1)
    def test_old(self): pass
def test_unmarked(group): pass
""")
    assert result.parseoutcomes()["failed"] + result.parseoutcomes()["errors"] == 4
    result.stdout.fnmatch_lines(
        ["*argument 'capsys' (CaptureFixture) cannot be sent to the ranks*"]
    )
    result.stdout.fnmatch_lines(["*needs a plain test function*"])
    result.stdout.fnmatch_lines(["*`group` needs @pytest.mark.ranks(n)*"])
    bad = inner("@pytest.mark.ranks('2', timeout=3)\ndef test_x(): pass")
    bad.stdout.fnmatch_lines(["*ranks('2', timeout=3): expected ranks(2) or ranks(1, 2, 4)*"])


def test_a_fault_in_a_ranks_thread_is_an_error_where_warnings_are(inner) -> None:
    result = inner(
        """
@pytest.mark.ranks(1)
def test_thread():
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
""",
        "-Werror",
        "-Wignore::pytest.PytestAssertRewriteWarning",  # of modules that this process has imported before the inner session
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*PytestUnhandledThreadExceptionWarning: *ZeroDivisionError*"])
