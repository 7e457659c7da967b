"""Whether all ranks run the same program in environments that compute alike, compared at start.

What makes the same sums come out otherwise is refused: ranks hold copies that each updates by
itself, and from the first such difference on they are no copies. What a machine is, and what only
changes how fast it is, is told as a note.
"""

import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ddp_kit.distributed.collectives import gather_bytes
from ddp_kit.distributed.process_group import Group
from ddp_kit.distributed.topology import environment
from ddp_kit.errors import ConfigError

# By which the same operation gives other bits.
CHANGE_NUMBERS = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDNN_CONV_WSCAP_DBG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
# Of which others may: told if they differ.
PREFIXES = ("CUBLAS_", "CUDNN_", "DNNL_", "KMP_", "MKL_", "OMP_", "ONEDNN_", "TORCH_")
NAMES = ("PYTHONHASHSEED",)
UNSET = "not set"


def require_same_machines(group: Group, *, exact: bool) -> list[str]:
    """Compares programs and environments over ranks. Every rank calls it.

    Args: `exact` with `--exact`: then what a machine is may not differ either.
    Returns: notes for the start, of what differs and may.
    Raises: ConfigError on every rank that names the first difference, and the ranks.
    """
    if group.control_pg is None:
        return []
    own = [_program(), _settings(), _machine(), _others()]
    rows = [json.loads(row) for row in gather_bytes(group, json.dumps(own).encode())]
    for name, values in _differences([row[0] for row in rows]):
        raise ConfigError(
            f"the ranks run different programs: {name} is {_by_rank(values)}. Ranks of other "
            "versions may add the same numbers otherwise. Start all of them from one environment."
        )
    for name, values in _differences([row[1] for row in rows]):
        raise ConfigError(
            f"the ranks compute differently: {name} is {_by_rank(values)}. Set it alike for all "
            "of them, or for none."
        )
    notes = []
    for name, values in _differences([row[2] for row in rows]):
        said = f"{name} is {_by_rank(values)}"
        if exact:
            raise ConfigError(
                f"--exact: the ranks' machines differ: {said}, and the same operation may give "
                "other bits on each. Start them on machines that are alike, or leave --exact out."
            )
        notes.append(f"the ranks' machines differ: {said}; sums may be rounded otherwise on each")
    for name, values in _differences([row[3] for row in rows]):
        notes.append(f"the ranks' environments differ: {name} is {_by_rank(values)}")
    return notes


def _program() -> dict[str, str]:
    """Returns the versions of what computes. The recipe's text is compared with the settings."""
    return {
        "ddp_kit": _version_of_ddp_kit(),
        "Python": ".".join(map(str, sys.version_info[:2])),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda),
        "NumPy": np.__version__,
    }


def _version_of_ddp_kit() -> str:
    try:
        return importlib.metadata.version("ddp_kit")
    except importlib.metadata.PackageNotFoundError:
        return "from a folder, not installed"


def _settings() -> dict[str, str]:
    """Returns what was set from outside and changes bits."""
    found = {name: environment().get(name, UNSET) for name in CHANGE_NUMBERS}
    found["torch.get_default_dtype()"] = str(torch.get_default_dtype())
    found["torch.are_deterministic_algorithms_enabled()"] = str(
        torch.are_deterministic_algorithms_enabled()
    )
    return found


def _machine() -> dict[str, str]:
    """Returns what a machine is."""
    found = {
        "the kind of CPU": platform.machine(),
        "torch's CPU capability": torch.backends.cpu.get_cpu_capability(),
        "the number of CPU threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["the GPU"] = torch.cuda.get_device_name()
    return found


def _others() -> dict[str, str]:
    found = dict(environment())
    for name in list(found):
        is_known = name in NAMES or name.startswith(PREFIXES)
        if not is_known or name in CHANGE_NUMBERS:
            del found[name]
    return found


def _differences(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Returns the names whose values are not the same on all ranks, with the value of each rank."""
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    found = []
    for name in names:
        values = [row.get(name, UNSET) for row in rows]
        if len(set(values)) > 1:
            found.append((name, values))
    return found


def _by_rank(values: Sequence[str]) -> str:
    """Returns each value with the ranks that have it."""
    said = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, other in enumerate(values) if other == value]
        where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks[:8])}"
        said.append(f"{value} on {where}")
    return ", ".join(said)
