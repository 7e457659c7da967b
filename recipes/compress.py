"""What comes after training: a ResNet's knowledge in a LeNet (distillation), then in int8, then in
a file that needs no recipe.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/cifar.py --blocks 3 --epochs 12 \
        --precision bf16 --run-dir runs/resnet
    ddp-kit ckpt export runs/resnet --best --out resnet.safetensors
    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/compress.py \
        --teacher resnet.safetensors --run-dir runs/lenet
    ddp-kit ckpt export runs/lenet --best --out lenet.safetensors
    python recipes/compress.py --teacher resnet.safetensors --student lenet.safetensors

The last command's table: the ResNet-20 has 82.6 % of the test images right with 1,069 KiB of
weights, the LeNet it taught for 5 epochs (435 steps) 66.5 % with 898 KiB, and in int8 66.4 % with
227 KiB. In so few epochs the teacher is no gain: LeNet on the labels alone, in recipes/cifar.py,
has 66.7 %. The exported files, 949 and 376 KiB, hold the graph too. 2 ranks on 2 CPU cores, torch
2.15.

It builds on recipes/cifar.py: keep both in one folder.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cifar
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, unfold

from ddp_kit import LossSum, Recipe
from ddp_kit.data.known import cifar10
from ddp_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings(cifar.Settings):
    """LeNet, taught by a ResNet; data, augmentation and optimizer are those of recipes/cifar.py."""

    model: Literal["resnet", "lenet"] = "lenet"  # the student
    epochs: int = 5
    teacher: str = ""  # the ResNet's weights, a .safetensors file
    hint: float = 0.9  # weight of the teacher's answers; the rest is that of the labels
    temperature: float = (
        4.0  # divides the logits of both: the higher, the more the unlikely classes count
    )


def load(file: str, *, flag: str, made_by: str) -> dict[str, Tensor]:
    if not Path(file).is_file():
        raise ConfigError(
            f"{flag} {file or '(none)'}: expected a .safetensors file of a run of "
            f"recipes/{made_by}.py. Type: ddp-kit ckpt export RUN --best --out FILE.safetensors, "
            f"then {flag} FILE.safetensors"
        )
    return load_file(file)


def load_resnet(file: str) -> nn.Module:
    """Returns the ResNet that wrote the file, frozen. Shapes tell its width and depth."""
    tensors = load(file, flag="--teacher", made_by="cifar")
    blocks = sum(name.endswith(".first.weight") for name in tensors) // 3
    if not blocks:
        raise ConfigError(
            f"--teacher {file}: no ResNet. Type --teacher FILE.safetensors of a run of "
            "recipes/cifar.py --model resnet"
        )
    model = cifar.resnet(len(tensors["0.weight"]), blocks)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


class Int8(nn.Module):
    """A layer in whole numbers: int8 weights with a scale for each output, int8 inputs with a scale
    for each sample, int32 sums.

    For linear layers and for convolutions of square images with stride 1 and no padding. Source:
    Jacob et al., arXiv 1712.05877.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear):
        super().__init__()
        weight = layer.weight.detach().flatten(1)  # (outputs, K)
        self.kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else None
        self.register_buffer("scale", weight.abs().amax(1) / 127)
        self.register_buffer("codes", (weight / self.scale[:, None]).round().to(torch.int8))
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        rows = (
            values[:, None] if self.kernel is None else unfold(values, self.kernel).transpose(1, 2)
        )  # (B, places, K)
        scale = rows.abs().amax((1, 2), keepdim=True).clamp(min=1e-12) / 127
        codes = (rows / scale).round().to(torch.int8)
        sums = torch._int_mm(codes.flatten(0, 1), self.codes.T).unflatten(
            0, codes.shape[:2]
        )  # (B, places, outputs)
        result = sums * scale * self.scale + self.bias
        side = values.shape[-1] - (self.kernel[0] - 1 if self.kernel else 0)
        return (
            result[:, 0]
            if self.kernel is None
            else result.transpose(1, 2).unflatten(2, (side, side))
        )


def quantised(model: nn.Sequential) -> nn.Sequential:
    """Returns a copy with its convolutions and linear layers in int8.

    No calibration: inputs are scaled as they come.
    """
    return nn.Sequential(
        *(Int8(layer) if isinstance(layer, nn.Conv2d | nn.Linear) else layer for layer in model)
    )


def exported(model: nn.Module, file: str) -> nn.Module:
    """Writes the model as a graph with its weights, for any batch size, and returns what is read
    back: no Python class is needed.
    """
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(
        torch.export.export(model, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},)), file
    )
    return torch.export.load(file).module()


def accuracy(model: nn.Module, data_root: str) -> float:
    data = cifar10(data_root, "test")
    batches = (
        data.__getitems__(range(start, min(start + 500, len(data))))
        for start in range(0, len(data), 500)
    )
    with torch.no_grad():
        return sum(
            int((model(images).argmax(1) == labels).sum()) for images, labels in batches
        ) / len(data)


def main(student: str, teacher: str, data_root: str = "data", out: str = "lenet") -> None:
    """Quantises and exports a trained student, and prints a table of accuracy (test images) and
    size.

    Args:
        student: LeNet's weights, a .safetensors file
        teacher: the ResNet's, for comparison
        data_root: folder that holds CIFAR-10
        out: where to write OUT.pt2 and OUT-int8.pt2
    """
    tensors = load(student, flag="--student", made_by="compress")
    small = cifar.lenet(len(tensors["0.weight"])).eval()
    small.load_state_dict(tensors)
    rows: list[tuple[str, str, nn.Module]] = [
        ("ResNet, the teacher", teacher, load_resnet(teacher)),
        ("LeNet, the student", student, small),
    ]
    for name, model, file in (
        ("exported", small, f"{out}.pt2"),
        ("exported in int8", quantised(small), f"{out}-int8.pt2"),
    ):
        rows.append((name, file, exported(model, file)))
    print(f"{'':20}{'test accuracy':>14}{'weights, KiB':>14}{'file, KiB':>11}")
    for name, file, model in rows:
        weights_kib = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1024
        print(
            f"{name:20}{accuracy(model, data_root):14.2%}{weights_kib:14.0f}"
            f"{Path(file).stat().st_size / 1024:11.0f}  {file}"
        )


def recipe(settings: Settings) -> Recipe:
    teacher = load_resnet(settings.teacher)  # no part of the model: neither trained nor saved

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
        images, labels = batch  # (B, 3, 32, 32) float, (B,) int
        logits = model(images)
        correct = (logits.argmax(1) == labels).sum()
        total = cross_entropy(logits, labels, reduction="sum")
        # Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", arXiv
        # 1503.02531
        if model.training:
            taught = log_softmax(teacher.to(images)(images) / settings.temperature, 1)
            said = log_softmax(logits / settings.temperature, 1)
            hint = kl_div(said, taught, reduction="sum", log_target=True) * settings.temperature**2
            total = settings.hint * hint + (1 - settings.hint) * total
        return LossSum(total, len(labels), metrics={"accuracy": (correct, len(labels))})

    return replace(cifar.recipe(settings), loss=loss)


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
