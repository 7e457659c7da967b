"""What `same_bits.py` runs: training at several sizes, what goes on from it, plans, help texts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

TRAIN = ("train",)  # python -m ddp_kit.train on as many ranks as the case says
DIGITS = "recipes/digits.py"
DATA = "<data>"  # stands for --data-root


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command.

    `name` is that of its record, KIND/WHAT. `ranks` is how many processes it starts. `kept` names
    the training case whose run directory lies in the folder as `run`; `is_kept` says that this
    case's run directory is needed by others. `env` adds variables.
    """

    name: str
    words: tuple[str, ...]
    ranks: int = 1
    kept: str = ""
    is_kept: bool = False
    env: Mapping[str, str] = field(default_factory=dict)


RECIPES = {
    "digits": (),
    "cifar": ("--global-batch", "64", "--micro-batch", "16", "--width", "4", "--data-root", DATA),
    "char_lm": ("--layers", "2", "--width", "64", "--data-root", DATA),
    "gan": ("--width", "8", "--data-root", DATA),
    "multitask": ("--width", "8", "--data-root", DATA),
}
WRAP = {"digits": ("Conv2d", "Linear"), "multitask": ("Conv2d", "Linear"), "gan": ("Conv2d",)}
STEPS = (
    "--save-every",
    "3",
    "--log-every",
    "1",
    "--threads",
    "1",
    "--device",
    "cpu",
    "--run-dir",
    "run",
)
SIZES = {
    "ddp": (1, 2, 4),
    "zero1": (2, 4),
    "fsdp": (2, 4),
    "deepspeed1": (2,),
    "deepspeed2": (2,),
    "deepspeed3": (2,),
}
VARIANTS = {
    "digits accumulated": (
        "digits",
        "--micro-batch",
        "8",
        "--ema",
        "0.9",
        "--grad-clip",
        "0.5",
        "--num-workers",
        "1",
    ),
    "digits early": (
        "digits",
        "--eval-every",
        "2",
        "--early-stop.metric",
        "loss",
        "--early-stop.patience",
        "1",
    ),
    "digits checkpointed": (
        "digits",
        "--activation-checkpointing",
        "Conv2d",
        "--no-tuning",
        "--seed",
        "7",
    ),
    "digits comm bf16": ("digits", "--comm", "bf16", "--precision", "bf16"),
    "digits deepspeed fp16": ("digits", "--strategy", "deepspeed", "--precision", "fp16"),
    "cifar lenet": ("cifar", "--model", "lenet", "--per-class"),
    "char_lm lstm": ("char_lm", "--architecture", "lstm", "--ragged"),
    "char_lm bert": ("char_lm", "--architecture", "bert", "--ragged"),
    "char_lm fsdp ema": ("char_lm", "--strategy", "fsdp", "--fsdp.wrap", "Block", "--ema", "0.9"),
    "multitask learned": (
        "multitask",
        "--weights",
        "learned",
        "--absent",
        "0.9",
        "--find-unused-parameters",
    ),
}
LAUNCHERS = ("local", "torchrun", "accelerate")


def strategy_flags(strategy: str, recipe: str) -> tuple[str, ...]:
    """Returns the flags that choose a strategy.

    ddp is `--exact` where the recipe states a micro-batch that fits.
    """
    if strategy == "ddp":
        return ("--exact",) if recipe == "cifar" else ()
    if strategy == "fsdp":
        return ("--strategy", "fsdp", "--fsdp.wrap", *WRAP.get(recipe, ("Block",)))
    if strategy.startswith("deepspeed"):
        return ("--strategy", "deepspeed", "--deepspeed.stage", strategy[-1])
    return ("--strategy", strategy)


def trained(
    name: str, recipe: str, flags: tuple[str, ...], *, ranks: int, steps: int = 6, kept: str = ""
) -> Case:
    """Returns a training case of `steps` steps.

    On two ranks it leaves its run directory to those that go on from it.
    """
    words = (
        *TRAIN,
        f"recipes/{recipe}.py",
        *RECIPES[recipe],
        *flags,
        *STEPS,
        "--max-steps",
        str(steps),
    )
    is_kept = not kept and ranks == 2 and name.endswith(("ddp 2", "fsdp 2"))
    return Case(name=name, words=words, ranks=ranks, kept=kept, is_kept=is_kept)


def runs() -> Iterator[Case]:
    for recipe in RECIPES:
        for strategy, sizes in SIZES.items():
            flags = strategy_flags(strategy, recipe)
            for ranks in sizes:
                yield trained(f"run/{recipe} {strategy} {ranks}", recipe, flags, ranks=ranks)
    for name, (recipe, *flags) in VARIANTS.items():
        yield trained(f"run/{name}", recipe, tuple(flags), ranks=2)
    for launcher in LAUNCHERS:
        words = (
            "ddp-kit",
            "run",
            "--launcher",
            launcher,
            "--nproc-per-node",
            "2",
            DIGITS,
            *STEPS,
            "--max-steps",
            "6",
        )
        yield Case(name=f"run/digits by {launcher}", words=words, ranks=2)


def resumes() -> Iterator[Case]:
    for recipe in RECIPES:
        for strategy in ("ddp", "fsdp"):
            if recipe == "gan" and strategy == "fsdp":
                continue  # refused: several objectives
            kept = f"run/{recipe} {strategy} 2"
            flags = strategy_flags(strategy, recipe)
            yield trained(f"resume/{recipe} {strategy}", recipe, flags, ranks=2, steps=9, kept=kept)
    for recipe in ("digits", "char_lm"):
        kept = f"run/{recipe} fsdp 2"
        yield trained(f"resume/{recipe} fsdp as ddp on 1", recipe, (), ranks=1, steps=9, kept=kept)
    flags = strategy_flags("deepspeed3", "digits")
    yield trained(
        "resume/digits ddp as deepspeed3",
        "digits",
        flags,
        ranks=2,
        steps=9,
        kept="run/digits ddp 2",
    )


READS = {
    "ckpt ls": ("ddp-kit", "ckpt", "ls", "run"),
    "ckpt verify": ("ddp-kit", "ckpt", "verify", "run"),
    "ckpt export": ("ddp-kit", "ckpt", "export", "run", "--best", "--out", "w.safetensors"),
    "ckpt diff": (
        "ddp-kit",
        "ckpt",
        "diff",
        "run/checkpoints/step-00000003",
        "run/checkpoints/step-00000006",
    ),
    "show": ("ddp-kit", "show", "run"),
    "logs": ("ddp-kit", "logs", "run"),
    "evaluate": (
        "ddp-kit",
        "evaluate",
        DIGITS,
        "--from",
        "run",
        "--best",
        "--threads",
        "1",
        "--device",
        "cpu",
    ),
    "init from": (
        *TRAIN,
        DIGITS,
        "--init-from",
        "run",
        "--max-steps",
        "2",
        "--threads",
        "1",
        "--run-dir",
        "next",
    ),
    "other settings": (*TRAIN, DIGITS, "--lr", "0.5", "--max-steps", "9", "--run-dir", "run"),
    "never resume": (*TRAIN, DIGITS, "--resume", "never", "--max-steps", "9", "--run-dir", "run"),
    "exact from now on": (
        *TRAIN,
        DIGITS,
        "--max-steps",
        "9",
        "--run-dir",
        "run",
        "--exact",
        "--micro-batch",
        "32",
    ),
}

SLURM = ("ddp-kit", "slurm", "--dry-run")
SWEEP = ("ddp-kit", "sweep", "--dry-run", "--grid", "lr=0.1,0.2", "--grid", "seed=0,1")
AGENTS = ("--launcher", "torchrun", "--nproc-per-node", "4")
PLANS = {
    "srun": (
        *SLURM,
        "--nodes",
        "2",
        "--gpus-per-node",
        "4",
        "--partition",
        "gpu",
        "--time",
        "1:00:00",
        DIGITS,
        "--lr",
        "0.2",
    ),
    "torchrun": (
        *SLURM,
        *AGENTS,
        "--nodes",
        "4",
        "--min-nodes",
        "2",
        "--cpus-per-task",
        "2",
        DIGITS,
    ),
    "accelerate": (
        *SLURM,
        "--launcher",
        "accelerate",
        "--nodes",
        "2",
        "--nproc-per-node",
        "2",
        DIGITS,
    ),
    "setup and env": (
        *SLURM,
        "--setup",
        "module load x",
        "--env",
        "A=b c",
        "--env-preset",
        "nccl-debug",
        DIGITS,
    ),
    "container": (*SLURM, "--container-image", "a b.sqsh", "--container-mounts", "/a:/b", DIGITS),
    "never requeued": (
        *SLURM,
        "--max-requeues",
        "0",
        "--name",
        "mine",
        "--no-snapshot",
        "--python",
        "python3",
        DIGITS,
    ),
    "restarts": (
        *SLURM,
        *AGENTS,
        "--max-restarts",
        "3",
        "--warn-s",
        "300",
        "--time",
        "2:00:00",
        DIGITS,
        "--run-dir",
        "r",
    ),
    "own options": (
        *SLURM,
        "--sbatch",
        "exclusive",
        "--sbatch",
        "mail-user=a b",
        "--srun",
        "cpu-bind=none",
        DIGITS,
    ),
    "places": (
        *SLURM,
        "--mem",
        "64G",
        "--qos",
        "q",
        "--account",
        "a",
        "--exclude",
        "n[1-3]",
        "--dependency",
        "afterok:1",
        DIGITS,
    ),
    "sweep": (*SWEEP, "--nodes", "2", DIGITS, "--epochs", "1"),
    "sweep, two at a time": (*SWEEP, "--parallel", "2", "--launcher", "torchrun", DIGITS),
    "sweep here": (*SWEEP, "--here", DIGITS, "--epochs", "1"),
    "cost of fsdp": (
        "ddp-kit",
        "plan",
        DIGITS,
        "--ranks",
        "8",
        "--strategy",
        "fsdp",
        "--gpu-memory-gib",
        "80",
    ),
    "cost of deepspeed": (
        "ddp-kit",
        "plan",
        DIGITS,
        "--ranks",
        "4",
        "--strategy",
        "deepspeed",
        "--deepspeed.stage",
        "3",
    ),
}

VERBS = (
    "run",
    "slurm",
    "jobs",
    "logs",
    "cancel",
    "resubmit",
    "sweep",
    "new",
    "check",
    "plan",
    "evaluate",
    "show",
    "ckpt",
    "env",
)
HELP = {
    "train digits": (*TRAIN, DIGITS, "--help"),
    "train": (*TRAIN, "--help"),
    "evaluate digits": ("ddp-kit", "evaluate", DIGITS, "--help"),
    "ckpt export": ("ddp-kit", "ckpt", "export", "--help"),
    "no verb": ("ddp-kit",),
    "ddp-kit": ("ddp-kit", "--help"),
} | {verb: ("ddp-kit", verb, "--help") for verb in VERBS}


def proper_uses() -> list[Case]:
    """Returns all cases but the mistakes, those first whose run directories others need."""
    found = [*runs(), *resumes()]
    for name, words in READS.items():
        found.append(Case(name=f"read/{name}", words=words, kept="run/digits ddp 2"))
    for name, words in PLANS.items():
        found.append(Case(name=f"plan/{name}", words=words))
    for name, words in HELP.items():
        found.append(Case(name=f"help/{name}", words=words))
    return found
