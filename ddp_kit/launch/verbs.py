"""How each of the launchers' verbs begins and ends: its words, its messages, its exit code."""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

from ddp_kit.launch.plan import LaunchError


class Main(Protocol):
    """A verb as `ddp-kit` calls it, on the words after it; None: those of this process."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Returns the exit code."""
        ...


def verb(name: str) -> Callable[[Callable[[Sequence[str]], int]], Main]:
    """Makes the `main` of a verb from what the verb does.

    It returns what that does, and with a message 2 for a LaunchError, and 1 for a file that
    cannot be read or written.
    """

    def decorate(command: Callable[[Sequence[str]], int]) -> Main:
        @functools.wraps(command)
        def main(argv: Sequence[str] | None = None) -> int:
            try:
                return command(sys.argv[1:] if argv is None else argv)
            except SystemExit as end:
                # argparse has said what is wrong
                return int(end.code or 0)
            except LaunchError as error:
                print(f"ddp-kit {name}: {error}", file=sys.stderr)
                return error.exit_code
            except OSError as error:
                print(f"ddp-kit {name}: {error}", file=sys.stderr)
                return 1

        return main

    return decorate
