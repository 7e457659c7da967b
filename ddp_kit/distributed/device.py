"""Which device a rank computes on."""

import torch

from ddp_kit.distributed.topology import Topology
from ddp_kit.errors import ConfigError


def choose_device(device: str, *, topology: Topology) -> torch.device:
    """Returns this rank's device: `cuda:(local_rank % visible devices)` or `cpu`.

    Args: `device` auto, cpu or cuda.
    Raises: ConfigError if CUDA is asked for and there is none, or the name is not known.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: expected auto, cpu or cuda.")
    if device == "cpu":
        return torch.device("cpu")
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if visible:
        return torch.device("cuda", topology.local_rank % visible)
    if device == "cuda":
        raise ConfigError(
            "--device cuda: no CUDA device is visible here (torch.cuda.is_available() is False)."
            " Type --device cpu, or auto."
        )
    return torch.device("cpu")
