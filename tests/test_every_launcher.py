"""One run under every launcher, on one node and on two: the same weights bit for bit, and the same losses."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from clusters import Cluster
from slurm_jobs import PACED, ROOT, train

FLAGS = ("--max-steps", "12", "--exact")
HERE = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
WITHIN_S = 120
AGENTS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "ddp_kit.train"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0"),
        *("--mixed_precision=no", "--dynamo_backend=no", "-m", "ddp_kit.train"),
    ],
    "ddp-kit run": ["-m", "launch.run", "--nproc-per-node", "2"],
}


def figures(run: Path) -> tuple[str, list[float]]:
    """Returns the hash of a run's weights and its training losses."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "status.json").read_text())["weights_sha256"], [
        record["loss"] for record in records if record["kind"] == "train"
    ]


def here(words: Sequence[str], run: Path) -> tuple[str, list[float]]:
    """Runs Python with these words, then the recipe, on this machine."""
    command = [sys.executable, *words, PACED, *FLAGS, "--run-dir", str(run)]
    done = subprocess.run(command, env=os.environ | HERE, cwd=run.parent, text=True, capture_output=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return figures(run)


@pytest.mark.slow
def test_every_launcher_gives_the_same_weights_and_losses(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = {"python": here(["-m", "ddp_kit.train"], tmp_path / "python")}
    for name, words in AGENTS.items():
        found[name] = here(words, tmp_path / name.replace(" ", "-"))
    for nodes in (1, 2):
        run = tmp_path / f"srun-{nodes}"
        step = ["srun", "--kill-on-bad-exit=1", f"--nodes={nodes}", "--ntasks=2", sys.executable, "-m", "ddp_kit.train"]
        cluster.run(*step, PACED, *FLAGS, "--run-dir", str(run), within_s=WITHIN_S, **HERE)
        found[f"srun, {nodes} nodes"] = figures(run)
    for launcher in ("srun", "torchrun", "accelerate"):
        for nodes in (1, 2) if launcher == "srun" else (2,):
            slurm = ["--nodes", str(nodes), "--nproc-per-node", str(2 // nodes), "--launcher", launcher]
            job = train(cluster, tmp_path / f"{launcher}-job-{nodes}", *FLAGS, slurm=slurm)
            job.ended(within_s=WITHIN_S)
            found[f"ddp-kit slurm, {launcher}, {nodes} nodes"] = figures(job.folder)
    assert len(set(found["python"][1])) == 12
    assert {name for name, figure in found.items() if figure != found["python"]} == set()
