"""What a run ran on: the facts of env.json and of `ddp-kit env`.

Versions, devices, git revision, launcher, and the topology with the source of each fact. Not the
environment as a whole, which holds secrets, and nothing that costs a start more than some
milliseconds.
"""

import dataclasses
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path

import numpy as np
import torch

from ddp_kit.distributed.topology import Topology, environment

GIT_TIMEOUT_S = 5.0
# Settings of libraries that change numbers or speed; names that never hold a secret.
TOLD_PREFIXES = (
    "NCCL_",
    "GLOO_",
    "OMP_",
    "MKL_",
    "CUDA_VISIBLE_",
    "CUBLAS_WORKSPACE_",
    "TORCH_NCCL_",
    "TORCH_DISTRIBUTED_",
    "PYTORCH_",
)


def environment_facts(
    topology: Topology, device: torch.device, *, recipe_folder: Path | None = None
) -> dict[str, object]:
    """Returns the facts as JSON values. Called by rank 0 alone; `recipe_folder` is where the git
    revision is looked up.
    """
    return {
        "versions": versions(),
        "host": host(),
        "devices": devices(device),
        "git": git_revision(recipe_folder) if recipe_folder else {},
        "topology": {
            name: value for name, value in dataclasses.asdict(topology).items() if name != "source"
        },
        "source": dict(topology.source),
        "environment": {
            name: value
            for name, value in sorted(environment().items())
            if name.startswith(TOLD_PREFIXES)
        },
    }


def versions() -> dict[str, str]:
    """Returns the version of all that numbers may depend on; an absent package is left out."""
    found = {
        "ddp_kit": _package("ddp_kit") or "from a folder, not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in ("torchvision", "wandb", "tensorboard", "tyro", "rich", "safetensors"):
        version = _package(package)
        if version:
            found[package] = version
    return found


def host() -> dict[str, object]:
    """Returns name, operating system, CPU model, and the cores that this process may use."""
    usable = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        usable = len(os.sched_getaffinity(0))
    return {
        "name": socket.gethostname(),
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable,
    }


def devices(device: torch.device) -> dict[str, object]:
    """Returns where this rank trains and which GPUs are visible; torch's threads on a CPU."""
    facts: dict[str, object] = {"device": str(device), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        gpus = []
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            gpus.append({"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)})
        facts["gpus"] = gpus
    return facts


def git_revision(folder: Path) -> dict[str, object]:
    """Returns the revision of the folder's repository and whether tracked files differ from it;
    nothing where git has no answer.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    if not revision:
        return {}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "is_dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=GIT_TIMEOUT_S,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
