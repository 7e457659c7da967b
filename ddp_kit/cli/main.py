"""`ddp-kit VERB ...`: the table of verbs. Flags are each verb's own."""

import importlib
import sys
from collections.abc import Sequence

from ddp_kit.errors import ConfigError, DdpKitError, nearest

# verb: (module with `main(argv) -> int`, one line of help)
VERBS = {
    "run": (
        "ddp_kit.launch.local.run",
        "train a recipe on this machine: run --nproc-per-node 8 RECIPE.py [recipe flags]",
    ),
    "slurm": (
        "ddp_kit.launch.slurm.submit",
        "submit it as a batch job: slurm --nodes 4 --gpus-per-node 8 RECIPE.py [recipe flags]; "
        "--dry-run shows it",
    ),
    "jobs": (
        "ddp_kit.launch.runs.jobs",
        "my runs: job, state, lives, step, loss, last checkpoint, why it waits",
    ),
    "logs": (
        "ddp_kit.launch.runs.logs",
        "what a run has said over all its lives: logs RUN [--rank 3] [-f]",
    ),
    "cancel": ("ddp_kit.launch.runs.cancel", "end a run after a save: cancel RUN [--now]"),
    "resubmit": (
        "ddp_kit.launch.runs.resubmit",
        "the same run as a new job, which resumes: resubmit RUN [--nodes 2]",
    ),
    "sweep": (
        "ddp_kit.launch.runs.sweep",
        "a run for each point: sweep --grid lr=0.1,0.2 RECIPE.py; sweep --show NAME",
    ),
    "new": (
        "ddp_kit.cli.new",
        "start a recipe of your own from a shipped one: new my.py --from cifar",
    ),
    "check": (
        "ddp_kit.cli.check",
        "two steps and an evaluation of a recipe: memory, rate, time to finish; leaves nothing",
    ),
    "plan": (
        "ddp_kit.cli.plan.command",
        "what it would cost on N ranks, without them: plan RECIPE.py --ranks 64 --strategy fsdp",
    ),
    "evaluate": ("ddp_kit.evaluate", "evaluate weights: evaluate RECIPE.py --from runs/NAME"),
    "show": ("ddp_kit.cli.show", "one screen about a run: status, metrics, curve: show runs/NAME"),
    "ckpt": ("ddp_kit.cli.ckpt", "a run's checkpoints: ckpt ls RUN, verify, export, diff"),
    "doctor": (
        "ddp_kit.cli.doctor.command",
        "is this place fit for a run: go or no-go, a line a check; also under srun and torchrun",
    ),
    "env": ("ddp_kit.cli.env", "what to paste into a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns: the exit code. An error of ours is printed without a traceback, any other one passes
        through.
    """
    if argv is None:
        argv = sys.argv[1:]
    words = list(argv)
    if not words:
        print(usage())
        return ConfigError.exit_code
    if words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    try:
        return _verb_main(words[0], words[1:])
    except DdpKitError as error:
        print(f"ddp-kit: {error}", file=sys.stderr)
        return error.exit_code


def usage() -> str:
    """Returns the verbs with one line each."""
    width = max(len(verb) for verb in VERBS)
    lines = ["usage: ddp-kit VERB [arguments]", ""]
    lines += [f"  {verb:{width}}  {line}" for verb, (_, line) in VERBS.items()]
    lines += ["", "ddp-kit VERB --help tells a verb's flags, RECIPE.py --help a recipe's"]
    return "\n".join(lines)


def _verb_main(verb: str, argv: Sequence[str]) -> int:
    if verb not in VERBS:
        near = nearest(verb, VERBS)
        hint = f" Did you mean {near}?" if near else ""
        raise ConfigError(f"unknown verb {verb}.{hint} The verbs are: {', '.join(VERBS)}.")
    code = importlib.import_module(VERBS[verb][0]).main(argv)
    assert isinstance(code, int), (verb, code)
    return code


if __name__ == "__main__":
    sys.exit(main())
