"""After transformers' run_glue.py (Hugging Face): a transformer that compares two sentences.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/glue.py

Kept: pairs as [CLS] one [SEP] other [SEP], batches padded to their longest, no decay for biases and
norms, a linear schedule, clipping, dropout, accuracy and F1. In place of MRPC stand sentences that
are made up: the same words in another order, or others. With `--init-from` it starts
from weights that were trained before.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, schedules

PAD, CLS, SEP, FIRST_WORD = 0, 1, 2, 3
Sample = tuple[Tensor, Tensor, int]
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Whether two sentences have the same words."""

    global_batch: int = 32
    micro_batch: int = 8  # dropout is drawn for a micro-batch: the same numbers on 1, 2 and 4 ranks
    epochs: int = 10
    lr: float = 1e-3  # peak learning rate
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    width: int = 64
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    words: int = 24  # that there are
    pairs: int = 2048  # to train on


class Pairs:
    """Tokens, which sentence each is of, and whether both have the same words."""

    def __init__(self, size: int, *, words: int, seed: int):
        self._size = size
        self._words = words
        self._seed = seed

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Sample:
        rng = np.random.default_rng((self._seed, index))
        one = rng.choice(self._words, size=rng.integers(3, 8), replace=False)
        other = rng.permutation(one)
        is_same = bool(rng.integers(2))
        if not is_same:
            other = rng.choice(self._words, size=len(one), replace=False)
        tokens = [CLS, *(one + FIRST_WORD), SEP, *(other + FIRST_WORD), SEP]
        segments = [0] * (len(one) + 2) + [1] * (len(other) + 1)
        return torch.tensor(tokens), torch.tensor(segments), int(is_same)


def collate(samples: list[Sample]) -> Batch:
    tokens = pad_sequence([sample[0] for sample in samples], batch_first=True, padding_value=PAD)
    segments = pad_sequence([sample[1] for sample in samples], batch_first=True)
    return tokens, segments, torch.tensor([sample[2] for sample in samples])


class Classifier(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        width = settings.width
        self.tokens = nn.Embedding(settings.words + FIRST_WORD, width, padding_idx=PAD)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)
        layer = nn.TransformerEncoderLayer(
            width, settings.heads, 2 * width, settings.dropout, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.pooler = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        """(B, T), (B, T) int -> (B, 2)."""
        states = self.dropout(self.norm(self.tokens(tokens) + self.segments(segments)))
        states = self.encoder(states, src_key_padding_mask=tokens == PAD)
        return self.head(self.dropout(torch.tanh(self.pooler(states[:, 0]))))


def loss(model: nn.Module, batch: Batch) -> LossSum:
    tokens, segments, labels = batch
    logits = model(tokens, segments)
    total = cross_entropy(logits, labels, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    return LossSum(total, len(labels), metrics={"accuracy": (right, len(labels))})


def said(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Returns predictions and labels as rows: F1 is of all samples, not of a batch."""
    return {"said": model(batch[0], batch[1]).argmax(1), "labels": batch[2]}


def scores(means: dict[str, float], rows: dict[str, Tensor]) -> dict[str, float]:
    is_right = rows["said"] == rows["labels"]
    found = float((is_right & (rows["labels"] == 1)).sum())
    named = float((rows["said"] == 1).sum() + (rows["labels"] == 1).sum())
    return {"accuracy": float(is_right.double().mean()), "f1": 2 * found / max(named, 1.0)}


def optimizer(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    decayed = []
    others = []
    for name, parameter in model.named_parameters():
        is_spared = name.endswith("bias") or "norm" in name
        (others if is_spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr)


def recipe(settings: Settings) -> Recipe:
    words = settings.words
    return Recipe(
        model=lambda: Classifier(settings),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.linear(
            optimizer, total_steps, warmup=0.1
        ),
        train_data=lambda: Data(Pairs(settings.pairs, words=words, seed=0), collate),
        eval_data=lambda: Data(Pairs(256, words=words, seed=1), collate),
        evaluate=said,
        summarize=scores,
    )
