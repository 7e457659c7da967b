"""What `same_bits.py` mistypes: flags, recipes, files and verbs, each with its message."""

from collections.abc import Iterator

from same_bits_cases import DIGITS, TRAIN, Case

# files that lie in the folder of every case
GOOD = """
from dataclasses import dataclass
import os
import torch
import ddp_kit
from ddp_kit import LossSum, Recipe

@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    global_batch: int = 8
    max_steps: int = 6
    device: str = "cpu"
    threads: int = 1
    lr: float = 0.1
    at_rank: int = -1

def loss(model, batch):
    return LossSum(torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))

def recipe(settings):
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(inputs, (inputs.sum(1) > 0).long())
    return Recipe(
        model=lambda: torch.nn.Linear(3, 2),
        loss=loss,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=settings.lr),
        train_data=lambda: data,
        eval_data=lambda: data,
    )
"""
RAISES = '    if os.environ.get("RANK", "0") == "1" and model.training:\n        raise ValueError("on rank 1 only")\n    return'
INFINITE = 'FACTOR = float("inf") if os.environ.get("RANK") == "1" else 1.0\n\n'
FILES = {
    "good.py": GOOD,
    "empty.py": "",
    "imports.py": "import no_such_module\n",
    "syntax.py": "def recipe(settings:\n",
    "no_settings.py": "def recipe(settings): ...\n",
    "bare.py": GOOD.replace("@dataclass(frozen=True, kw_only=True)\n", ""),
    "two.py": GOOD.replace("recipe(settings)", "recipe(settings, model)"),
    "raises.py": GOOD.replace("    return", RAISES, 1),
    "infinite.py": GOOD.replace("model(batch[0])", "model(batch[0]) * FACTOR").replace(
        "@dataclass", INFINITE + "@dataclass"
    ),
    "nothing.py": GOOD.replace("model.parameters()", "[torch.nn.Parameter(torch.zeros(1))]"),
    "no_data.py": GOOD.replace("inputs = torch.randn(64,", "inputs = torch.randn(7,"),
    "torn.toml": "lr = = 3\n",
    "unknown.toml": "global-bach = 3\n",
    "wrong.toml": "epochs = 1.5\n",
    "fine.toml": "lr = 0.2\nmax_steps = 2\n[early_stop]\nmetric = 'loss'\n",
    "decided.json": '{"train_batch_size": 3}\n',
}

FLAGS = {  # of digits, in one process
    "unknown flag": "--global-bach 3",
    "unknown nested flag": "--early-stop.patince 3",
    "nothing alike": "--zzz",
    "stray word": "stray",
    "no number": "--lr fast",
    "no integer": "--epochs 1.5",
    "no value": "--epochs",
    "value of a switch": "--compile yes",
    "no precision": "--precision fp17",
    "no tracker": "--tracker mlflow",
    "no device": "--device tpu",
    "peer batch": "--batch-size 8",
    "peer accumulation": "--gradient-accumulation-steps 2",
    "peer precision": "--mixed-precision bf16",
    "peer devices": "--devices 2",
    "peer clip": "--max-grad-norm=1",
    "peer output": "--output_dir x",
    "no batch": "--global-batch 0",
    "several": "--eval-every -5 --ema 2 --num-workers -1 --log-every 0",
    "no end": "--epochs 0",
    "nan clip": "--grad-clip nan",
    "negative seed": "--seed -1",
    "patience without metric": "--early-stop.patience 9",
    "wandb without tracker": "--wandb.project p",
    "fsdp without strategy": "--fsdp.wrap-size 0",
    "deepspeed without strategy": "--deepspeed.stage 2",
    "exact without micro-batch": "--exact",
    "exact with fsdp": "--exact --micro-batch 16 --strategy fsdp",
    "exact with a batch that does not split": "--exact --micro-batch 48",
    "comm with fsdp": "--comm bf16 --strategy fsdp",
    "wrong module": "--strategy fsdp --fsdp.wrap Blok",
    "deepspeed fp64": "--strategy deepspeed --precision fp64",
    "deepspeed decided": "--strategy deepspeed --deepspeed.config decided.json",
    "deepspeed no file": "--strategy deepspeed --deepspeed.config missing.json",
    "settings missing": "--settings missing.toml",
    "settings torn": "--settings torn.toml",
    "settings unknown": "--settings unknown.toml",
    "settings wrong": "--settings wrong.toml",
    "settings nothing": "--lr 1 --settings",
    "init from nothing": "--init-from missing.safetensors",
    "resume from nothing": "--resume missing",
    "change of nothing": "--change zzz",
    "rename without init": "--rename a=b",
    "metric mistyped": "--early-stop.metric acuracy",
    "no such module": "--activation-checkpointing Linar",
    "batchnorm on cpu": "--sync-batchnorm",
    "tf32 on cpu": "--precision tf32",
    "cuda without": "--device cuda",
    "run dir is a file": "--run-dir good.py",
}
COMMANDS = {
    "no recipe": "train",
    "flag first": "train --epochs 1",
    "missing recipe": "train recipes/digit.py",
    "folder": "train recipes",
    "no module": "train no_such_package.module",
    "no data": "train recipes/cifar.py --data-root nowhere",
    "no text": "train recipes/char_lm.py --data-root nowhere",
    "recipe's own refusal": "train recipes/multitask.py --absent 0.5",
    "no ranks": "ddp-kit run --nproc-per-node 0 good.py",
    "ranks no number": "ddp-kit run --nproc-per-node x good.py",
    "no launcher": "ddp-kit run --launcher mpi good.py",
    "run nothing": "ddp-kit run",
    "launcher's flag behind": "ddp-kit run good.py --nproc-per-node 2",
    "run's unknown flag": "ddp-kit run --nodes 2 good.py",
    "verb mistyped": "ddp-kit trian",
    "ckpt of nothing": "ddp-kit ckpt ls missing",
    "ckpt verb": "ddp-kit ckpt zzz",
    "ckpt verify nothing": "ddp-kit ckpt verify missing",
    "ckpt export nothing": "ddp-kit ckpt export missing --out w.safetensors",
    "show nothing": "ddp-kit show missing",
    "evaluate without weights": "ddp-kit evaluate good.py",
    "evaluate nothing": "ddp-kit evaluate good.py --from missing",
    "logs of nothing": "ddp-kit logs missing",
    "cancel nothing": "ddp-kit cancel missing",
    "resubmit nothing": "ddp-kit resubmit missing",
    "new over a file": "ddp-kit new good.py --from digits",
    "new from nothing": "ddp-kit new mine.py --from nope",
    "plan without ranks": "ddp-kit plan good.py",
    "sweep without grid": "ddp-kit sweep good.py",
    "sweep's wrong grid": "ddp-kit sweep --grid lr --grid run-dir=a good.py",
    "sweep of nothing": "ddp-kit sweep --show nope",
    "slurm's many faults": "ddp-kit slurm --nodes 0 --mem 3x --time soon --env Q --srun K --dry-run nope.py",
    "fewer nodes with srun": "ddp-kit slurm --nodes 4 --min-nodes 2 --dry-run good.py",
    "unknown partition": "ddp-kit slurm --partition gpuu good.py",
    "too long": "ddp-kit slurm --partition gpu --time 3-0 good.py",
    "help behind": "ddp-kit slurm good.py --help",
}
TWO_RANKS = {
    "one rank raises": "raises.py",
    "loss is not a number": "infinite.py",
    "fewer samples than ranks": "good.py --global-batch 1",
    "exact on 3 ranks": "good.py --exact --micro-batch 1 --global-batch 8",
    "settings and flags": "good.py --settings fine.toml --lr 0.3",
}
BAD_RECIPES = ("empty", "imports", "syntax", "no_settings", "bare", "two", "nothing", "no_data")


def mistakes() -> Iterator[Case]:
    for name, flags in FLAGS.items():
        yield Case(name=f"mistake/{name}", words=(*TRAIN, DIGITS, *flags.split()))
    for name, line in COMMANDS.items():
        yield Case(name=f"mistake/{name}", words=tuple(line.split()))
    for name in BAD_RECIPES:
        yield Case(name=f"mistake/recipe {name}", words=(*TRAIN, f"{name}.py", "--run-dir", "run"))
    for name, line in TWO_RANKS.items():
        ranks = 3 if "3 ranks" in name else 2
        words = (
            "ddp-kit",
            "run",
            "--nproc-per-node",
            str(ranks),
            *line.split(),
            "--run-dir",
            "run",
        )
        yield Case(name=f"mistake/{name}", words=words, ranks=ranks)
    yield Case(
        name="mistake/half set", words=(*TRAIN, "good.py"), env={"RANK": "0", "WORLD_SIZE": "2"}
    )
