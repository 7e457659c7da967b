"""Character language models on tinyshakespeare: a GPT, or by `--architecture` a BERT that fills in
masked characters, or an LSTM.

    torchrun --nproc_per_node=2 -m ddp_kit.train recipes/char_lm.py --data-root data

Bits per character of the last tenth of the text: GPT 2.43 (1,960 steps, 150 s from command to end);
with `--ragged`, 2,304 steps: LSTM 2.30 (66 s), BERT 2.51 for the masked characters, which it sees
from both sides (133 s). 2 ranks on 2 CPU cores, torch 2.15.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW

import ddp_kit
from ddp_kit import Data, LossSum, Recipe, orders, schedules
from ddp_kit.errors import ConfigError, DataError

PAD, MASK, SYMBOLS = 0, 1, 256  # a symbol is a byte; the first two occur in no text


@dataclass(frozen=True, kw_only=True)
class Settings(ddp_kit.Settings):
    """Character language models on tinyshakespeare."""

    global_batch: int = 16
    epochs: int = 2
    lr: float = 3e-3  # peak learning rate
    grad_clip: float = 1.0
    eval_every: int = 500
    architecture: Literal["gpt", "bert", "lstm"] = "gpt"
    width: int = 128  # numbers that stand for a character
    layers: int = 4
    heads: int = 4  # of attention; an LSTM has none
    length: int = 64  # characters in a sequence, at most
    ragged: bool = False  # sequences end where a speech ends
    data_root: str = "data"  # folder that holds tinyshakespeare.txt


class Block(nn.Module):
    """Attention and a small net, each behind a LayerNorm and beside a shortcut.

    Source: Radford et al., GPT-2, 2019, section 2.3.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.tell = heads, nn.Linear(width, width)
        self.ask = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(
        self, states: Tensor, bias: Tensor
    ) -> Tensor:  # (B, T, width), (B or 1, heads, T, T)
        query, key, value = (
            self.ask(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        seen = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        states = states + self.tell(seen.transpose(1, 2).flatten(2))
        return states + self.net(states)


class LanguageModel(nn.Module):
    def __init__(self, settings: Settings):
        super().__init__()
        width = settings.width
        self.heads = settings.heads
        self.architecture = settings.architecture
        self.symbols = nn.Embedding(SYMBOLS, width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))
        memory = nn.LSTM(width, width, num_layers=settings.layers, batch_first=True)
        blocks = nn.ModuleList(Block(width, settings.heads) for _ in range(settings.layers))
        self.inner = memory if self.architecture == "lstm" else blocks

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, SYMBOLS)
        """Attention fades with distance, at another rate in each head.

        Source: Press et al., ALiBi, arXiv 2108.12409.
        """
        states = self.symbols(tokens)
        if self.architecture == "lstm":
            return self.out(self.inner(states)[0])
        heads, places = (
            torch.arange(size, device=tokens.device) for size in (self.heads, tokens.shape[1])
        )
        turns = torch.ones_like(heads)
        if self.architecture == "bert":  # half of its heads look ahead
            turns = heads % 2 * 2 - 1
        beyond = turns[:, None, None] * (places - places[:, None])
        unseen = (beyond > 0) | ((beyond < 0) & (tokens == PAD)[:, None, None])
        bias = (
            2.0 ** (-8 / self.heads * (heads + 1)).to(states.dtype)[:, None, None] * -beyond.abs()
        ).masked_fill(unseen, -math.inf)
        for block in self.inner:
            states = block(states, bias)
        return self.out(states)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> LossSum:
    inputs, targets = batch  # (B, T) int; PAD is no target
    logits = model(inputs).transpose(1, 2)
    count = (
        targets != PAD
    ).sum()  # a tensor: the mean is over the characters of all ranks, however many each one has
    right = (logits.argmax(1) == targets).sum()
    return LossSum(
        cross_entropy(logits, targets, reduction="sum", ignore_index=PAD),
        count,
        metrics={"accuracy": (right, count)},
    )


def collate(samples: list[Tensor]) -> tuple[Tensor, Tensor]:
    padded = pad_sequence(samples, batch_first=True, padding_value=PAD)
    return padded[:, :-1], padded[:, 1:]


def masked(tokens: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    draws = torch.where(tokens == PAD, 2.0, draws[..., : tokens.shape[1]])
    is_hidden = draws <= draws.amin(1, keepdim=True).clamp(
        min=0.15
    )  # Source: Devlin et al., BERT, arXiv 1810.04805, section 3.1
    return tokens.masked_fill(is_hidden, MASK), tokens.masked_fill(~is_hidden, PAD)


def sequences(text: bytes, settings: Settings, *, training: bool) -> Data:
    """Cuts a text into `length` characters and the one that follows, and if ragged at the end of
    each speech too.
    """
    size = settings.length
    speeches = [text]
    if settings.ragged:
        speeches = [speech + b"\n\n" for speech in text.split(b"\n\n")]
    pieces = []
    for one in speeches:
        pieces += [torch.tensor(list(one[i : i + size + 1])) for i in range(0, len(one) - 1, size)]
    order = None
    if settings.ragged and training:
        order = orders.by_length([len(piece) for piece in pieces], group=settings.global_batch)
    if settings.architecture != "bert":
        return Data(pieces, collate=collate, order=order)
    if training:
        return Data(
            pieces,
            collate,
            lambda batch, draws: masked(batch[1], torch.from_numpy(draws.uniform(size))),
            order,
        )
    fixed = torch.rand(
        size, generator=torch.Generator().manual_seed(0)
    )  # so that each evaluation, on any ranks, asks the same
    return Data(pieces, collate=lambda samples: masked(collate(samples)[1], fixed))


def continued(model: nn.Module, settings: Settings) -> str:
    """Returns the prompt and 200 characters more; a BERT is asked for a mask behind the text, one
    after another.
    """
    tokens = torch.tensor([list(b"ROMEO:\n")], device=next(model.parameters()).device)
    asked = torch.full((1, int(settings.architecture == "bert")), MASK, device=tokens.device)
    for _ in range(200):
        logits = model(torch.cat([tokens, asked], 1)[:, -settings.length :])[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(1), 1)], 1)
    return bytes(tokens[0].tolist()).decode(errors="replace")


def flops_per_sample(settings: Settings) -> float:
    """Of a whole sequence, forward and back.

    Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    per_layer, seen = (8, 0) if settings.architecture == "lstm" else (12, settings.length)
    return (
        6.0
        * settings.length
        * settings.width
        * (settings.layers * (per_layer * settings.width + 2 * seen) + SYMBOLS)
    )


def recipe(settings: Settings) -> Recipe:
    file = Path(settings.data_root, "tinyshakespeare.txt")
    if not file.is_file():
        raise DataError(
            f"no text was found. Looked for:\n  {file.absolute()}\n"
            "Type: --data-root DIR, a folder that holds it."
        )
    if settings.width % settings.heads:
        raise ConfigError(
            f"--heads {settings.heads} does not divide --width {settings.width}. "
            "Type --heads 1, 2 or 4, or another --width."
        )
    text, split = file.read_bytes(), file.stat().st_size * 9 // 10
    return Recipe(
        model=lambda: LanguageModel(settings),
        loss=loss,
        optimizer=lambda model: AdamW(
            model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.1
        ),
        scheduler=lambda optimizer, total_steps: schedules.warmup_cosine(optimizer, total_steps),
        train_data=lambda: sequences(text[:split], settings, training=True),
        eval_data=lambda: sequences(text[split:], settings, training=False),
        summarize=lambda means, rows: {
            "perplexity": math.exp(means["loss"]),
            "bits_per_character": means["loss"] / math.log(2),
        },
        samples=lambda model: {"text": continued(model, settings)},
        flops_per_sample=flops_per_sample(settings),
    )
