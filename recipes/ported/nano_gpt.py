"""After nanoGPT's train.py and model.py (A. Karpathy): a small GPT on text that is made up here.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/ported/nano_gpt.py

Kept: tied embeddings, two decay groups of AdamW, warm-up and cosine down to a tenth of the rate,
clipping, windows at random places. `gradient_accumulation_steps` follows from global_batch and
micro_batch, and the loss is a sum over tokens, which nobody scales.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.optim import AdamW

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, schedules

WORDS = ("the", "a", "small", "red", "old", "fox", "owl", "boat", "sees", "likes", "and", "then")


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """A small GPT."""

    global_batch: int = 32
    micro_batch: int = 8
    max_steps: int = 300
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.1  # of matrices and embeddings; biases and norms have none
    grad_clip: float = 1.0
    layers: int = 2
    heads: int = 4
    width: int = 64
    block_size: int = 32  # characters that the model sees


def text(words: int) -> bytes:
    """Returns made-up prose, the same at any seed of a run."""
    chosen = np.random.default_rng(0).choice(WORDS, size=words)
    return " ".join(chosen.tolist()).encode()


class Windows:
    """Sample i is the text from character i on: (block_size + 1,) int."""

    def __init__(self, said: bytes, size: int):
        self._tokens = torch.tensor(list(said))
        self._size = size

    def __len__(self) -> int:
        return len(self._tokens) - self._size

    def __getitem__(self, index: int) -> Tensor:
        return self._tokens[index : index + self._size + 1]


def random_places(seed: int, epoch: int, size: int) -> np.ndarray:
    """An order of places drawn with replacement, as `get_batch` has it."""
    return np.random.default_rng((seed, epoch)).integers(size, size=size)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first_norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor) -> Tensor:  # (B, T, width)
        parts = self.attention(self.first_norm(states)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.projection(seen.transpose(1, 2).flatten(2))
        return states + self.net(states)


class Gpt(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        self.tokens = nn.Embedding(128, settings.width)
        self.places = nn.Embedding(settings.block_size, settings.width)
        self.blocks = nn.Sequential(
            *(Block(settings.width, settings.heads) for _ in range(settings.layers))
        )
        self.norm = nn.LayerNorm(settings.width)
        self.head = nn.Linear(settings.width, 128, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            # GPT-2's: what is added to the states so often begins smaller.
            nn.init.normal_(block.projection.weight, std=0.02 / math.sqrt(2 * settings.layers))
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, 128)
        places = torch.arange(tokens.shape[1], device=tokens.device)
        states = self.blocks(self.tokens(tokens) + self.places(places))
        return self.head(self.norm(states))


def loss(model: nn.Module, batch: Tensor) -> LossSum:
    inputs, targets = batch[:, :-1], batch[:, 1:]
    logits = model(inputs)
    total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return LossSum(total, targets.numel())


def optimizer(model: nn.Module, settings: Settings) -> AdamW:
    matrices = [weight for weight in model.parameters() if weight.dim() >= 2]
    vectors = [weight for weight in model.parameters() if weight.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))


def recipe(settings: Settings) -> Recipe:
    said = text(4000)
    split = len(said) * 9 // 10
    return Recipe(
        model=lambda: Gpt(settings),
        loss=loss,
        optimizer=lambda model: optimizer(model, settings),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(
            optimizer, total_steps, final=0.1
        ),
        train_data=lambda: Data(Windows(said[:split], settings.block_size), order=random_places),
        eval_data=lambda: Windows(said[split:][:500], settings.block_size),
    )
