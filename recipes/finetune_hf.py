"""Fine-tunes a causal language model of Hugging Face transformers on texts, both from local
folders: no network is used.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/finetune_hf.py --model-dir gpt2 \
        --data-dir texts --run-dir runs/tuned
    torchrun ... --lora-rank 8 --lr 2e-4 --save-trainable-only    # peft: adapters alone are saved

`--model-dir` is what `save_pretrained` of a model and its tokenizer wrote, `--data-dir` what a data
set's `save_to_disk` wrote. To use the result, copy the model's folder without its weights, and
export into it; `from_pretrained` loads that folder:

    ddp-kit ckpt export runs/tuned --best --out tuned/model.safetensors

A GPT-2 of 1.0 million weights that had learnt nothing before, on the 7,222 speeches of
tinyshakespeare in 1,024 byte-pair tokens (`--lr 3e-3 --epochs 1 --max-tokens 128`): a perplexity of
124 on the speeches held out after 214 steps, 61 s from the command to the end. 2 ranks on 2 CPU
cores, torch 2.15, transformers 5.23, datasets 5.2.

Adapters load into `peft.get_peft_model(model, config)` by
`load_state_dict(safetensors.torch.load_file(FILE), strict=False)`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, orders, schedules
from ddp_kit.errors import ConfigError, DataError, require

IGNORED = -100  # the target where there is none


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Fine-tunes a causal language model of Hugging Face transformers on texts."""

    global_batch: int = 32
    micro_batch: int = 8  # 4 micro-batches: dropout gives the same numbers on 1, 2 and 4 ranks
    epochs: int = 3
    lr: float = 5e-5  # peak learning rate; adapters want about 2e-4
    weight_decay: float = 0.01  # of matrices; biases and norms have none
    grad_clip: float = 1.0
    model_dir: str = ""  # folder of a model and its tokenizer
    data_dir: str = ""  # folder of a data set, whole or with splits train and validation
    column: str = "text"  # where the data set has its texts
    max_tokens: int = 256  # a longer text is cut
    lora_rank: int = (
        0  # train adapters of this rank in all linear layers, and nothing else; 0 is off
    )


def causal_model(settings: Settings) -> nn.Module:
    model = require("transformers", extra="hf").AutoModelForCausalLM.from_pretrained(
        settings.model_dir, local_files_only=True
    )
    if settings.lora_rank:
        peft = require("peft", extra="hf")
        is_conv = any(
            type(layer).__name__ == "Conv1D" for layer in model.modules()
        )  # GPT-2's linear layers, transposed
        shape = {
            "r": settings.lora_rank,
            "lora_alpha": 2 * settings.lora_rank,
            "fan_in_fan_out": is_conv,
        }
        model = peft.get_peft_model(
            model, peft.LoraConfig(**shape, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    return model.float().train()  # loaded for evaluation, and in the precision of the file


def splits(settings: Settings) -> Mapping[str, Any]:
    """Returns the data set's train and validation parts; a twentieth is held out of one without
    splits.
    """
    found = require("datasets", extra="hf").load_from_disk(settings.data_dir)
    if not isinstance(found, dict):
        held = found.train_test_split(test_size=0.05, seed=0)
        found = {"train": held["train"], "validation": held["test"]}
    for name in ("train", "validation"):
        if name not in found or settings.column not in found[name].column_names:
            has = ", ".join(
                f"{split} ({', '.join(part.column_names)})" for split, part in found.items()
            )
            raise DataError(
                f"{settings.data_dir} has {has}; expected {name} with {settings.column}. "
                "Type --column or another --data-dir."
            )
    return found


def sequences(texts: list[str], settings: Settings) -> list[Tensor]:
    """Returns the tokens of each text, with the end-of-text token where the tokenizer has one."""
    tokenizer = require("transformers", extra="hf").AutoTokenizer.from_pretrained(
        settings.model_dir, local_files_only=True
    )
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = [(own + end)[: settings.max_tokens] for own in tokenizer(list(texts))["input_ids"]]
    return [torch.tensor(own) for own in tokens if len(own) > 1]


def collate(samples: list[Tensor]) -> dict[str, Tensor]:
    return {
        "input_ids": pad_sequence(samples, batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones_like(sample) for sample in samples], batch_first=True
        ),
        "labels": pad_sequence(samples, batch_first=True, padding_value=IGNORED),
    }


def loss(model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits[:, :-1]
    targets = batch["labels"][:, 1:]  # (B, T - 1): what comes next
    count = (
        targets != IGNORED
    ).sum()  # a tensor: the mean is over the tokens of all ranks, however many each one has
    right = (logits.argmax(-1) == targets).sum()
    total = cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )
    return LossSum(total, count, metrics={"accuracy": (right, count)})


def optimizer(model: nn.Module, settings: Settings) -> AdamW:
    trained = [
        parameter for parameter in model.parameters() if parameter.requires_grad
    ]  # a tied one comes once
    matrices, others = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=settings.lr)


def recipe(settings: Settings) -> Recipe:
    if settings.lora_rank < 0:
        raise ConfigError(
            f"--lora-rank {settings.lora_rank}: expected 1 or more, or 0 for no adapters."
        )
    for flag, folder, file in (
        ("model", settings.model_dir, "config.json"),
        ("data", settings.data_dir, "*.json"),
    ):
        if not folder or not list(Path(folder).glob(file)):
            looked = (
                f"no {flag} in {Path(folder).absolute()}" if folder else f"--{flag}-dir is not set"
            )
            raise ConfigError(
                f"{looked}. Type --{flag}-dir DIR, a folder with {file} "
                "as save_pretrained or save_to_disk leaves it."
            )

    def data(split: str) -> Data:
        samples = sequences(splits(settings)[split][settings.column], settings)
        lengths = [len(sample) for sample in samples]
        return Data(
            samples, collate=collate, order=orders.by_length(lengths, group=settings.global_batch)
        )

    return Recipe(
        model=lambda: causal_model(settings),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.linear(optimizer, total_steps),
        train_data=lambda: data("train"),
        eval_data=lambda: data("validation"),
        summarize=lambda means, rows: {"perplexity": math.exp(means["loss"])},
    )
