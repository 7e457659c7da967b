"""`ddp-kit resubmit RUN [flags] [-- recipe flags]`: the same run directory as a new job, which resumes.

Owns: what of the earlier submission may change. Refuses: new code, unless `--new-code` asks for it.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_kit.launch.local import accelerate
from ddp_kit.launch.plan import LaunchError, answered, processes_of
from ddp_kit.launch.runs.found import FoundRun, find
from ddp_kit.launch.slurm.script import render
from ddp_kit.launch.slurm.submit import fields_of, parser, submit
from ddp_kit.launch.slurm.plan import Run, SlurmPlan


def plan_again(run: FoundRun, given: Mapping[str, Any]) -> SlurmPlan:
    """Returns the plan of a run's last submission with what flags change, without the nodes that failed a pre-flight check."""
    path = run.folder / "launch" / "plan.json"
    if not path.exists():
        raise LaunchError(
            f"{run.folder}: it was not submitted to SLURM. Start it as before with --run-dir {run.quoted}: it resumes."
        )
    earlier = SlurmPlan.from_json(path.read_text(encoding="utf-8"))
    changes = fields_of(given) | {name: given[name] for name in ("nodes",) if name in given}
    gpus = int(changes.get("gpus_per_node", earlier.gpus_per_node))
    if "nproc_per_node" in given:
        changes["processes"] = processes_of(given["nproc_per_node"], gpus=gpus)
    if "accelerate_config" in given:
        config = accelerate.config_of(
            given["accelerate_config"], launcher=str(changes.get("launcher", earlier.launcher))
        )
        nodes, each = accelerate.agreed(
            changes.get("processes"), nodes=changes.get("nodes"), config=config
        )
        changes |= {
            name: value
            for name, value in (("nodes", nodes), ("processes", each))
            if value is not None
        }
    if (
        "processes" not in changes
        and "gpus_per_node" in changes
        and earlier.processes == earlier.gpus_per_node
    ):
        changes["processes"] = gpus
    changes["exclude"] = run.without_bad_nodes(str(changes.get("exclude", earlier.exclude)))
    words = [*earlier.runs[0].words, *given.get("words", [])]
    return SlurmPlan.from_json(
        path.read_text(encoding="utf-8"),
        **changes,
        runs=(Run(folder=str(run.folder), words=tuple(words)),),
    )


def _main(argv: Sequence[str]) -> int:
    reader = parser(
        "resubmit",
        what="Submits a run again: same directory, it resumes, other sizes allowed. Recipe flags after -- are added.",
    )
    reader.add_argument("--new-code", action="store_true", help="copy the code as it is now")
    reader.add_argument("run", help="its folder or a job id")
    reader.set_defaults(
        **dict.fromkeys(vars(reader.parse_args(["RUN"])))
    )  # None: not typed, and so not changed
    reader.epilog = "flags of the recipe come after --: ddp-kit resubmit RUN -- --max-steps 900"
    reader.usage = "ddp-kit resubmit [flags as of ddp-kit slurm] [--new-code] RUN [-- recipe flags]"
    at = argv.index("--") if "--" in argv else len(argv)
    given = {
        name: value
        for name, value in vars(reader.parse_args(argv[:at])).items()
        if value is not None
    }
    given["words"] = argv[at + 1 :]
    run = find(given["run"])
    plan = plan_again(run, given)
    if given.get("dry_run"):
        print(render(plan), end="")
        return 0
    if (
        "new_code" in given and plan.snapshot and Path(plan.snapshot).parent != run.folder
    ):  # other points of the sweep may run from it
        raise LaunchError(
            f"--new-code: {plan.snapshot} is the whole sweep's. Leave it out, or start a sweep with another --name."
        )
    run.require_free()
    (run.folder / "STOP").unlink(missing_ok=True)
    job = submit(plan, copies="new_code" in given)
    without = f", without {plan.exclude}" if plan.exclude else ""
    print(
        f"job {job.job_id}: {run.folder} goes on from step {max(run.newest_checkpoint(), 0)}{without}"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns: 0 once the job is submitted, 2 if it is refused."""
    return answered("resubmit", _main, argv)


if __name__ == "__main__":
    sys.exit(main())
