"""Contenders that take turns: each has ranks of its own, which live through the whole benchmark and
wait while others run.

A benchmark's script is started again for every rank with `--contender NAME`; there it calls
`serve`. The parent calls `compare`. Own processes, because an allocator's settings and a scheduling
class cannot be put back within one.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def serve(run: Callable[[int], None]) -> None:
    """In a rank: runs as many steps as each line from the parent says, and answers with the seconds
    they took.
    """
    print("ready", flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        run(int(line))
        print(f"took {time.perf_counter() - begin}", flush=True)


class Ranks:
    """The ranks of one contender."""

    def __init__(self, name: str, *, script: str, world_size: int, arguments: Sequence[str]):
        self.name = name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._processes = []
        for rank in range(world_size):
            facts = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "MASTER_PORT": port,
            }
            environ = (
                os.environ
                | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
                | {key: str(value) for key, value in facts.items()}
            )
            command = [sys.executable, script, "--contender", name, *arguments]
            self._processes.append(
                subprocess.Popen(
                    command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )

    def answer(self, sign: str) -> str:
        """Reads every rank's lines up to one that begins with `sign`; returns rank 0's."""
        answers = []
        for process in self._processes:
            for line in process.stdout:
                if line.startswith(sign):
                    answers.append(line)
                    break
            else:
                raise SystemExit(f"{self.name}: a rank ended with exit code {process.wait()}")
        return answers[0]

    def run(self, steps: int) -> float:
        """Returns the seconds that rank 0 took for `steps`."""
        for process in self._processes:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        return float(self.answer("took").split()[1])

    def close(self) -> list[str]:
        """Ends the ranks; returns what each has said since its last turn."""
        for process in self._processes:
            process.stdin.close()
        said = [process.stdout.read() for process in self._processes]
        for process in self._processes:
            process.wait(timeout=60)
        return said


def start(
    names: Sequence[str], *, script: str, world_size: int, arguments: Sequence[str] = ()
) -> list[Ranks]:
    """Returns the contenders when all of them wait for their turn."""
    contenders = []
    for name in names:  # one at a time: starting is heavier than running
        contenders.append(Ranks(name, script=script, world_size=world_size, arguments=arguments))
        contenders[-1].answer("ready")
    return contenders


def take_turns(contenders: Sequence[Ranks], *, rounds: int, steps: int) -> dict[str, list[float]]:
    """Returns each contender's milliseconds per step, round by round."""
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        contender.run(max(3, steps // 4))
    for number in range(rounds):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            times[contender.name].append(contender.run(steps) / steps * 1e3)
    return times


def compare(
    names: Sequence[str],
    *,
    script: str,
    world_size: int,
    rounds: int,
    steps: int,
    arguments: Sequence[str] = (),
) -> dict[str, list[float]]:
    """Starts the contenders, lets them take turns and ends them; returns what `take_turns` does."""
    contenders = start(names, script=script, world_size=world_size, arguments=arguments)
    times = take_turns(contenders, rounds=rounds, steps=steps)
    for contender in contenders:
        contender.close()
    return times


def show(
    times: dict[str, list[float]],
    *,
    unit: str = "ms/step",
    targets: Mapping[str, float] | None = None,
    digits: int = 2,
) -> None:
    """Prints medians with their spread, and ratios to the first row, taken round by round, beside
    the most they should be.
    """
    base = next(iter(times))
    print(f"{'contender':48} {f'{unit}: median (min-max)':30} ratio to {base!r}: median (min-max)")
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times[base], strict=True)]
        spread = f"{statistics.median(own):.4g} ({min(own):.4g}-{max(own):.4g})"
        target = f"  target {targets[name]:.2f}" if targets and name in targets else ""
        print(
            f"{name:48} {spread:30} {statistics.median(ratios):.3f} "
            f"({min(ratios):.{digits}f}-{max(ratios):.{digits}f}){target}"
        )
    print(f"load of the machine at the end: {os.getloadavg()[0]:.1f}", flush=True)
