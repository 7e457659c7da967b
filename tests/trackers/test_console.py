"""The console: one live line on a terminal, plain lines in a pipe, and next to no cost per step."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from paths import ROOT

from ddp_kit.trackers.base import RunInfo
from ddp_kit.trackers.console import Console, duration, live_line, train_line

TRAIN = {
    "kind": "train",
    "step": 10,
    "epoch": 0,
    "samples": 5120,
    "loss": 0.5,
    "lr": 0.1,
    "samples_per_s": 1234.5,
    "data_wait": 0.01,
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f\x9b]")

CONSOLE = """
import os, sys, time
from pathlib import Path
from ddp_kit.trackers import RunInfo
from ddp_kit.trackers.console import Console

def run(console):
    console.start(RunInfo(run_dir=Path("runs/x"), name="digits", total_steps=40))
    for step in range(1, 41):
        time.sleep(0.02)
        if step % 20 == 0:
            console.log({"kind": "train", "step": step, "epoch": 0, "loss": 1 / step, "lr": 0.1, "samples_per_s": 1234.5})
        console.progress(step)
        if step == 20:
            print("printed by the user", flush=True)
            console.log({"kind": "eval", "step": step, "epoch": 0, "loss": 0.25, "accuracy": 0.875})
    console.sample("text", "two\\nlines \\x1b[31m[bold]", step=40)
    console.finish({"status": "finished", "reason": "", "step": 40, "metrics": {"accuracy": 0.875}})

run(Console())
assert "rich" not in sys.modules
os.dup2(int(sys.argv[1]), 1)
run(Console())
"""


@pytest.fixture(scope="module")
def printed():
    """What the same run prints into a pipe and then, its stdout replaced, on a pseudo-terminal of 110 columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 110, 0, 0))
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("COLUMNS", "LINES", "NO_COLOR")
    }
    environ |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", CONSOLE, str(follower)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, env=environ, pass_fds=[follower]
    )
    os.close(follower)
    on_terminal = b""
    try:
        while chunk := os.read(leader, 65536):
            on_terminal += chunk
    except (
        OSError
    ):  # EIO: nobody holds the other side any more, which is how a terminal ends on Linux
        pass
    finally:
        os.close(leader)
    piped, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return piped, on_terminal.decode()


def on_screen(written: str) -> list[str]:
    """What a terminal shows at the end: carriage return and "erase line" are obeyed, colours dropped."""
    lines = [""]
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\r|\n)", written):
        if piece == "\n":
            lines.append("")
        elif piece == "\x1b[2K":
            lines[-1] = ""
        elif not piece.startswith("\x1b") and piece != "\r":
            lines[-1] += piece
    return [line.rstrip() for line in lines]


def test_into_a_pipe_each_record_is_a_plain_line_and_rich_stays_away(printed):
    piped, _ = printed
    lines = piped.splitlines()
    assert CONTROL.search(piped) is None
    assert lines[0] == "step 20/40  epoch 0  loss 0.05  lr 0.1  1,234 samples/s"
    assert lines[1:3] == [
        "printed by the user",
        "eval  step 20  epoch 0  loss 0.25  accuracy 0.875",
    ]
    assert lines[3].startswith("step 40/40  epoch 0  loss 0.025  lr 0.1")
    assert lines[4] == "sample  step 40  text: two lines  [31m[bold]"
    assert lines[5:] == ["finished at step 40  accuracy 0.875"]


def test_on_a_terminal_one_line_lives_and_all_else_stands_above_it(printed):
    _, written = printed
    shown = [line for line in on_screen(written) if line]
    assert shown[:2] == ["printed by the user", "eval  step 20  epoch 0  loss 0.25  accuracy 0.875"]
    assert "━  step 40/40  epoch 0  loss 0.025" in shown[-2]
    assert shown[-1] == "finished at step 40  accuracy 0.875"
    assert len(shown) == 5, shown
    live = re.findall(r"step (\d+)/40", written)
    assert len(set(live)) >= 3, "progress moves the line between records"
    hidden = re.findall(r"\x1b\[\?25l(.*?)\x1b\[\?25h", written, flags=re.DOTALL)
    assert hidden, "rich hides the cursor"
    assert not any("step" in text for text in hidden), (
        "and gets it back at once: a killed run leaves a usable terminal"
    )


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_the_live_line_never_wraps(width):
    text = train_line(TRAIN, total=40, left_s=65)
    line = live_line(text, share=0.5, width=width).plain
    assert len(line) < width
    assert "step 10/40" in line
    assert ("━" in line, text in line) == (width >= 80, width >= 80)


def test_a_step_with_nothing_due_costs_less_than_two_microseconds(tmp_path):
    console = Console(stream=(tmp_path / "out").open("w"))
    console.start(RunInfo(run_dir=tmp_path, name="x", total_steps=10))
    console._due = time.monotonic() + 60  # as between two refreshes of a terminal

    def cost_s() -> float:
        start = time.perf_counter()
        for step in range(10_000):
            console.progress(step)
        return (time.perf_counter() - start) / 10_000

    assert min(cost_s() for _ in range(5)) < 2e-6
    console.finish({"status": "stopped", "step": 1})
    console._stream.close()


def test_waiting_for_data_is_said_when_it_matters():
    assert "40% waiting for data" in train_line({**TRAIN, "data_wait": 0.4})
    assert "waiting" not in train_line(TRAIN)
    assert (
        train_line({"step": 3, "loss": float("nan"), "samples_per_s": 2.5}, total=9, left_s=65)
        == "step 3/9  loss nan  2.5 samples/s  1:05 left"
    )
    assert [duration(59.7), duration(3661)] == ["1:00", "1:01:01"]
