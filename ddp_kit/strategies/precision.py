"""Arithmetic of the forward pass, and the loss scale of fp16.

Here are autocast, the dtype of weights and the cast to it, the TF32 switches, where a precision is
refused, and the rule by which the scale moves. Whether a step is applied is not decided here: that
is seen in the reduced gradients, which are the same on all ranks.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from ddp_kit.distributed.topology import environment_default
from ddp_kit.errors import ConfigError
from ddp_kit.settings import Precision

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 2.0**-24
# Doubled any further it would soon be inf, and stay so when halved.
LARGEST_SCALE = 2.0**100
MOST_AT_FLOOR = 20  # steps in a row that overflow at the smallest scale


@dataclass
class LossScale:
    """The scale of fp16 losses: halved when gradients overflow, doubled after 2,000 good steps.

    Off: always 1. Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740. The
    state is two numbers.
    """

    is_on: bool
    scale: float = 1.0
    good_steps: int = 0
    growth_interval: int = 2000
    # In a row, that overflowed at the smallest scale. Counted anew in each attempt.
    steps_at_floor: int = 0

    @classmethod
    def of(cls, precision: Precision) -> "LossScale":
        """Returns the scale that a precision needs."""
        if precision == "fp16":
            return cls(is_on=True, scale=2.0**16)
        return cls(is_on=False)

    def update(self, *, overflowed: bool) -> None:
        """Takes the outcome of a step; the same on all ranks."""
        if not self.is_on:
            return
        if overflowed:
            if self.scale == SMALLEST_SCALE:
                self.steps_at_floor += 1
            self.scale = max(self.scale / 2, SMALLEST_SCALE)
            self.good_steps = 0
            return
        self.steps_at_floor = 0
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale = min(self.scale * 2, LARGEST_SCALE)
            self.good_steps = 0

    def to_save(self) -> dict[str, float]:
        """Returns what a checkpoint keeps of it."""
        kept = asdict(self)
        del kept["steps_at_floor"]
        return kept

    @property
    def is_hopeless(self) -> bool:
        """Whether no scale is small enough: what is not finite does not come from fp16."""
        return self.steps_at_floor >= MOST_AT_FLOOR


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Returns the context in which model and loss run."""
    if precision in AUTOCAST:
        return torch.autocast(device.type, AUTOCAST[precision])
    return nullcontext()


def weight_dtype(precision: Precision) -> torch.dtype:
    """Returns the dtype of weights, optimizer state and floating-point batches."""
    return torch.float64 if precision == "fp64" else torch.float32


def placed(model: nn.Module, *, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Returns a model on a device, its floating-point tensors cast to a dtype and its complex ones
    to the complex dtype of that width."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and _overlaps(buffer):
                # Of one that was expanded, many elements are one: nothing can be written into it.
                module._buffers[name] = buffer.contiguous()
    if not any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        return model.to(device, dtype)
    complex_dtype = dtype.to_complex()

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():
            # Resolved: a view that is conjugated lazily has no bytes of its own.
            return tensor.to(complex_dtype).resolve_conj()
        if tensor.is_floating_point():
            return tensor.to(dtype)
        return tensor

    model.to(device)
    # model.to(dtype) would drop the imaginary parts.
    cast_model: nn.Module = model._apply(cast)
    return cast_model


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements of a tensor share memory with each other."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return any(size > 1 and not stride for size, stride in sizes_and_strides)


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Switches TF32 on for `tf32` and off otherwise, and puts the switches back.

    Raises: ConfigError where the device cannot run the precision.
    """
    _refuse_unsupported(precision, device)
    if device.type != "cuda":
        yield
        return
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    matmul_before = matmul.allow_tf32
    cudnn_before = cudnn.allow_tf32
    matmul.allow_tf32 = precision == "tf32"
    cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32 = matmul_before
        cudnn.allow_tf32 = cudnn_before


@contextmanager
def deterministic(is_on: bool, device: torch.device) -> Iterator[None]:
    """Switches CUDA's deterministic algorithms on, and puts the switches back.

    On a CPU one thread is enough.
    """
    if not is_on or device.type != "cuda":
        yield
        return
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark_before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    try:
        # cuBLAS wants to see it in this mode.
        with environment_default("CUBLAS_WORKSPACE_CONFIG", ":4096:8"):
            yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        torch.backends.cudnn.benchmark = benchmark_before


def _refuse_unsupported(precision: Precision, device: torch.device) -> None:
    """Raises: ConfigError where the device cannot run the precision."""
    if precision == "tf32" and not _has_tf32(device):
        raise ConfigError(
            "--precision tf32 needs a CUDA device of the Ampere generation or later; this rank "
            f"runs on {device}. Type --precision fp32."
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "--precision bf16: this CUDA device has no bfloat16. Type --precision fp16."
        )
    if precision == "fp16" and device.type == "cpu" and not has_fp16(device):
        raise ConfigError(
            "--precision fp16: torch has no float16 kernels for this CPU. "
            "Type --precision bf16, or fp32."
        )


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def has_fp16(device: torch.device) -> bool:
    """Whether a linear layer and a convolution run forward and backward in float16."""
    try:
        with torch.autocast(device.type, torch.float16), torch.random.fork_rng(devices=[]):
            net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(4, 1)).to(device)
            net(torch.ones(1, 1, 4, 4, device=device)).float().sum().backward()
    except RuntimeError:
        return False
    return True
