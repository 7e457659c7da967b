"""One run under every launcher, on one node and on two: the same weights bit for bit, and the same losses.

DeepSpeed's launcher may live in an environment of its own: DDP_KIT_DEEPSPEED_PYTHON names its Python.
"""

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from clusters import PROGRAM, Cluster
from paths import KIT, ROOT
from slurm_jobs import PACED, train

FLAGS = ("--max-steps", "12", "--exact")
HERE = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(KIT)]), "OMP_NUM_THREADS": "1"}
WITHIN_S = 240
AGENTS = {
    "torchrun": [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "ddp_kit.train",
    ],
    "accelerate": [
        *(
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes=2",
            "--num_machines=1",
            "--main_process_port=0",
        ),
        *("--mixed_precision=no", "--dynamo_backend=no", "-m", "ddp_kit.train"),
    ],
    "ddp-kit run": ["-m", "ddp_kit.launch.local.run", "--nproc-per-node", "2"],
}
BY_HAND = {  # on each of two nodes; {node} is its number, {port} one of the first node's
    "torchrun": [
        *(
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            "--nproc-per-node=1",
            "--node-rank={node}",
            "--master-addr=n0",
        ),
        *("--master-port={port}", "-m", "ddp_kit.train"),
    ],
    "accelerate": [
        *(
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_machines=2",
            "--num_processes=2",
            "--machine_rank={node}",
        ),
        *(
            "--main_process_ip=n0",
            "--main_process_port={port}",
            "--mixed_precision=no",
            "--dynamo_backend=no",
            "-m",
            "ddp_kit.train",
        ),
    ],
    "deepspeed": [
        *(
            "-m",
            "deepspeed.launcher.runner",
            "--hostfile=hosts",
            "--no_ssh",
            "--node_rank={node}",
            "--master_addr=n0",
        ),
        *("--master_port={port}", "--no_local_rank", "--module", "ddp_kit.train"),
    ],
}
DEEPSPEED = os.environ.get("DDP_KIT_DEEPSPEED_PYTHON", sys.executable)
HAS_DEEPSPEED = sys.executable != DEEPSPEED or importlib.util.find_spec("deepspeed") is not None


def figures(run: Path) -> tuple[str, list[float]]:
    """Returns the hash of a run's weights and its training losses."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "status.json").read_text())["weights_sha256"], [
        record["loss"] for record in records if record["kind"] == "train"
    ]


def here(words: Sequence[str], run: Path) -> tuple[str, list[float]]:
    """Runs Python with these words, then the recipe, on this machine."""
    command = [sys.executable, *words, PACED, *FLAGS, "--run-dir", str(run)]
    done = subprocess.run(
        command,
        env=os.environ | HERE,
        cwd=run.parent,
        text=True,
        capture_output=True,
        timeout=WITHIN_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return figures(run)


@contextlib.contextmanager
def started(
    cluster: Cluster, node: str, words: Sequence[str], run: Path
) -> Iterator["subprocess.Popen[str]"]:
    """A program on a node, without SLURM, which is ended if it has not by then."""
    command = [
        sys.executable,
        PROGRAM,
        "exec",
        str(cluster.folder),
        node,
        "--",
        *words,
        PACED,
        *FLAGS,
        "--run-dir",
        str(run),
    ]
    with (run.parent / f"{run.name}-{node}.txt").open("w") as file:
        with subprocess.Popen(
            command, env=cluster.environ | HERE, cwd=run.parent, text=True, stdout=file, stderr=file
        ) as process:
            try:
                yield process
            finally:
                process.terminate()


def by_hand(
    cluster: Cluster, python: str, words: Sequence[str], run: Path
) -> tuple[str, list[float]]:
    """Runs a launcher on both nodes at once, as one types it there."""
    with socket.create_server(("", 0)) as found:
        port = found.getsockname()[1]
    (run.parent / "hosts").write_text("n0 slots=1\nn1 slots=1\n")
    end = time.monotonic() + WITHIN_S
    with contextlib.ExitStack() as stack:
        filled = [
            [
                python,
                *(word.replace("{node}", str(node)).replace("{port}", str(port)) for word in words),
            ]
            for node in (0, 1)
        ]
        nodes = [
            stack.enter_context(started(cluster, f"n{node}", each, run))
            for node, each in enumerate(filled)
        ]
        codes = [node.wait(timeout=max(1, end - time.monotonic())) for node in nodes]
    assert codes == [0, 0], "\n".join(
        (run.parent / f"{run.name}-n{node}.txt").read_text()[-3000:] for node in (0, 1)
    )
    assert json.loads((run / "env.json").read_text())["topology"]["nodes"] == 2
    return figures(run)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", BY_HAND)
def test_a_launcher_that_is_typed_on_two_nodes_gives_the_weights_of_one_process(
    launcher: str, cluster: Cluster, tmp_path: Path
) -> None:
    if launcher == "deepspeed" and not HAS_DEEPSPEED:
        pytest.skip(
            "deepspeed is not installed: pip install deepspeed, or DDP_KIT_DEEPSPEED_PYTHON=/its/python"
        )
    python = DEEPSPEED if launcher == "deepspeed" else sys.executable
    assert by_hand(cluster, python, BY_HAND[launcher], tmp_path / launcher) == here(
        ["-m", "ddp_kit.train"], tmp_path / "python"
    )


@pytest.mark.slow
def test_every_launcher_gives_the_same_weights_and_losses(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.chdir(tmp_path)
    found = {"python": here(["-m", "ddp_kit.train"], tmp_path / "python")}
    for name, words in AGENTS.items():
        found[name] = here(words, tmp_path / name.replace(" ", "-"))
    for nodes in (1, 2):
        run = tmp_path / f"srun-{nodes}"
        step = [
            "srun",
            "--kill-on-bad-exit=1",
            f"--nodes={nodes}",
            "--ntasks=2",
            sys.executable,
            "-m",
            "ddp_kit.train",
        ]
        cluster.run(*step, PACED, *FLAGS, "--run-dir", str(run), within_s=WITHIN_S, **HERE)
        found[f"srun, {nodes} nodes"] = figures(run)
    for launcher in ("srun", "torchrun", "accelerate"):
        for nodes in (1, 2):
            slurm = [
                "--nodes",
                str(nodes),
                "--nproc-per-node",
                str(2 // nodes),
                "--launcher",
                launcher,
            ]
            job = train(cluster, tmp_path / f"{launcher}-job-{nodes}", *FLAGS, slurm=slurm)
            job.ended(within_s=WITHIN_S)
            found[f"ddp-kit slurm, {launcher}, {nodes} nodes"] = figures(job.folder)
    assert len(set(found["python"][1])) == 12
    assert {name for name, figure in found.items() if figure != found["python"]} == set()
