"""`ddp-kit resubmit RUN [flags] [-- recipe flags]`: the same run directory as a new job.

The new job resumes. Flags change what of the earlier submission may change; the code stays the
earlier copy unless `--new-code` asks for another.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError, processes_of
from ddp_kit.launch.runs.found import FoundRun
from ddp_kit.launch.runs.lookup import find
from ddp_kit.launch.slurm.command_line import fields_of, parser
from ddp_kit.launch.slurm.plan import Run, SlurmPlan
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import submit
from ddp_kit.launch.verbs import verb


def plan_again(run: FoundRun, given: Mapping[str, Any]) -> SlurmPlan:
    """Returns the plan of a run's last submission with what flags change.

    Nodes that failed a node check are left out. Raises: LaunchError if it was not submitted, or
    what flags change has faults.
    """
    path = run.folder / "launch" / "plan.json"
    if not path.exists():
        raise LaunchError(
            f"{run.folder}: it was not submitted to SLURM. "
            f"Start it as before with --run-dir {run.quoted}: it resumes."
        )
    text = path.read_text(encoding="utf-8")
    earlier = SlurmPlan.from_json(text)
    changes = fields_of(given) | _sizes(given, earlier=earlier)
    changes["exclude"] = run.without_bad_nodes(str(changes.get("exclude", earlier.exclude)))
    words = (*earlier.runs[0].words, *given.get("words", []))
    runs = (Run(folder=str(run.folder), words=words),)
    return SlurmPlan.from_json(text, **changes, runs=runs)


def _sizes(given: Mapping[str, Any], *, earlier: SlurmPlan) -> dict[str, int]:
    """Returns what flags say of a plan's nodes and of the ranks on each."""
    sizes: dict[str, int] = {}
    if "nodes" in given:
        sizes["nodes"] = given["nodes"]
    gpus = int(given.get("gpus_per_node", earlier.gpus_per_node))
    if "nproc_per_node" in given:
        sizes["processes"] = processes_of(given["nproc_per_node"], gpus=gpus)
    if "accelerate_config" in given:
        launcher = str(given.get("launcher", earlier.launcher))
        config = accelerate.config_of(given["accelerate_config"], launcher=launcher)
        nodes, processes = accelerate.agreed(
            sizes.get("processes"), nodes=sizes.get("nodes"), config=config
        )
        if nodes is not None:
            sizes["nodes"] = nodes
        if processes is not None:
            sizes["processes"] = processes
    had_a_rank_a_gpu = earlier.processes == earlier.gpus_per_node
    if "processes" not in sizes and "gpus_per_node" in given and had_a_rank_a_gpu:
        sizes["processes"] = gpus
    return sizes


def _parser() -> argparse.ArgumentParser:
    reader = parser(
        "resubmit",
        what="Submits a run again: same directory, it resumes, other sizes allowed. "
        "Recipe flags after -- are added.",
    )
    reader.add_argument("--new-code", action="store_true", help="copy the code as it is now")
    reader.add_argument("run", help="its folder or a job id")
    # None: not typed, and so not changed
    reader.set_defaults(**dict.fromkeys(vars(reader.parse_args(["RUN"]))))
    reader.epilog = "flags of the recipe come after --: ddp-kit resubmit RUN -- --max-steps 900"
    reader.usage = "ddp-kit resubmit [flags as of ddp-kit slurm] [--new-code] RUN [-- recipe flags]"
    return reader


def _read(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the flags that were typed by name, and the recipe's as `words`."""
    own = list(argv)
    words: list[str] = []
    if "--" in own:
        at = own.index("--")
        words = own[at + 1 :]
        own = own[:at]
    typed = vars(_parser().parse_args(own))
    given = {name: value for name, value in typed.items() if value is not None}
    return given | {"words": words}


@verb("resubmit")
def main(argv: Sequence[str]) -> int:
    """The command. Returns: 0 once the job is submitted, 2 if it is refused."""
    given = _read(argv)
    run = find(given["run"])
    plan = plan_again(run, given)
    if given.get("dry_run"):
        print(render(plan), end="")
        return 0
    has_new_code = "new_code" in given
    # other points of the sweep may run from it
    if has_new_code and plan.snapshot and Path(plan.snapshot).parent != run.folder:
        raise LaunchError(
            f"--new-code: {plan.snapshot} is the whole sweep's. "
            "Leave it out, or start a sweep with another --name."
        )
    run.require_free()
    (run.folder / "STOP").unlink(missing_ok=True)
    job = submit(plan, copies=has_new_code)
    text = f"job {job.job_id}: {run.folder} goes on from step {max(run.newest_checkpoint(), 0)}"
    if plan.exclude:
        text += f", without {plan.exclude}"
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
