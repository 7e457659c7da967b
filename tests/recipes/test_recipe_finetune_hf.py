"""finetune_hf learns, alone and by adapters, with the same numbers on any number of ranks, and transformers loads what it exports."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import shipped
import torch

from ddp_kit.cli import ckpt
from ddp_kit.errors import ConfigError, MissingPackageError
from ddp_kit.recipe import load_recipe

MADE = """
import sys
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
import torch

words = [f"w{i}" for i in range(20)]
torch.manual_seed(0)
inner = Tokenizer(models.WordLevel({"<end>": 0} | {word: i + 1 for i, word in enumerate(words)}))
inner.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>").save_pretrained(sys.argv[1] + "/model")
sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 21, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(sys.argv[1] + "/model")
texts = [" ".join(words[(start + i) % 20] for i in range(4 + start * 7 % 13)) for start in range(400)]
Dataset.from_dict({"text": texts}).save_to_disk(sys.argv[1] + "/texts")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 that knows nothing, its tokenizer, and texts in which each word follows from the one before: guessing has 3.04 nats."""
    import subprocess

    made = tmp_path_factory.mktemp("hf")
    subprocess.run(
        [sys.executable, "-c", MADE, str(made)], check=True, capture_output=True, timeout=120
    )
    return made


def flags(folder: Path, *more: str) -> list[str]:
    return ["--model-dir", str(folder / "model"), "--data-dir", str(folder / "texts"), *more]


LEARNING = (
    "--max-steps",
    "60",
    "--epochs",
    "0",
    "--lr",
    "0.01",
    "--precision",
    "fp64",
    "--global-batch",
    "16",
    "--micro-batch",
    "4",
)


def test_what_is_missing_is_named_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped_recipe = load_recipe(str(shipped.RECIPES / "finetune_hf.py"))
    settings, build = shipped_recipe.settings, shipped_recipe.build
    with pytest.raises(ConfigError, match=r"--model-dir is not set.*Type --model-dir DIR"):
        build(settings())
    (tmp_path / "config.json").touch()
    with pytest.raises(ConfigError, match=r"no data in .*none.*Type --data-dir DIR"):
        build(settings(model_dir=str(tmp_path), data_dir=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="--lora-rank -1"):
        build(settings(lora_rank=-1))
    monkeypatch.setitem(sys.modules, "transformers", None)
    made = build(settings(model_dir=str(tmp_path), data_dir=str(tmp_path)))
    with pytest.raises(MissingPackageError, match=r"pip install 'ddp_kit\[hf\]'"):
        made.model()


def test_norms_and_biases_are_not_decayed_and_a_tied_weight_comes_once() -> None:
    module = sys.modules[load_recipe(str(shipped.RECIPES / "finetune_hf.py")).build.__module__]
    net = torch.nn.Sequential(
        torch.nn.Embedding(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 5)
    )
    net[2].weight = net[0].weight
    decayed, others = module.optimizer(net, SimpleNamespace(weight_decay=0.1, lr=1.0)).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4)]
    assert (decayed["weight_decay"], others["weight_decay"], len(others["params"])) == (0.1, 0.0, 3)


def test_each_token_weighs_the_same_whatever_it_is_padded_with() -> None:
    module = sys.modules[load_recipe(str(shipped.RECIPES / "finetune_hf.py")).build.__module__]
    table = torch.nn.Embedding(9, 9)

    def model(
        *, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool
    ) -> SimpleNamespace:
        assert attention_mask.sum() == sum(lengths)
        return SimpleNamespace(logits=table(input_ids))

    lengths = [7, 2, 4]
    samples = [torch.arange(1, size + 1) for size in lengths]
    together = module.loss(model, module.collate(samples))
    assert together.count == 6 + 1 + 3
    lengths, alone = (
        [7],
        torch.nn.functional.cross_entropy(table(samples[0][:-1]), samples[0][1:], reduction="sum"),
    )
    assert module.loss(model, module.collate(samples[:1])).total.item() == pytest.approx(
        alone.item()
    )
    rest = [
        torch.nn.functional.cross_entropy(table(one[:-1]), one[1:], reduction="sum")
        for one in samples[1:]
    ]
    assert together.total.item() == pytest.approx((alone + sum(rest)).item())


@pytest.mark.slow
def test_it_learns_the_same_on_two_ranks_and_from_pretrained_loads_the_export(
    folder: Path, tmp_path: Path
) -> None:
    losses = shipped.assert_same_numbers(
        "finetune_hf", *flags(folder, *LEARNING), tmp_path=tmp_path
    )
    assert (
        losses[-1] < 1.2 < 2.9 < losses[0]
    )  # dropout stays, and the first word of a text cannot be foreseen
    tuned = tmp_path / "tuned"
    shutil.copytree(folder / "model", tuned, ignore=shutil.ignore_patterns("*.safetensors"))
    ckpt.export(tmp_path / "ranks-2/run", out=tuned / "model.safetensors")
    assert_same_logits(tuned)


PEFTS_OWN = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.mark.slow
@PEFTS_OWN
def test_adapters_learn_are_saved_alone_and_load_into_peft(folder: Path, tmp_path: Path) -> None:
    args = flags(folder, *LEARNING, "--lora-rank", "4", "--save-trainable-only", "--lr", "0.03")
    losses = shipped.assert_same_numbers("finetune_hf", *args, tmp_path=tmp_path)
    assert losses[-1] < 2.5 < 2.9 < losses[0]  # the embeddings stay random, so less than above
    out = tmp_path / "adapters.safetensors"
    ckpt.export(tmp_path / "ranks-2/run", out=out)
    from safetensors.torch import load_file

    adapters = load_file(out)
    assert adapters
    assert all("lora_" in name for name in adapters)
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64), config
    ).eval()
    tokens = torch.arange(1, 9)[None]
    with torch.no_grad():
        before = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
        assert not model.load_state_dict(adapters, strict=False).unexpected_keys
        after = torch.nn.functional.cross_entropy(model(tokens).logits[0, :-1], tokens[0, 1:])
    assert after < before - 0.2


def assert_same_logits(tuned: Path) -> None:
    """Compares what `from_pretrained` loads with a model that is given the file's tensors by name."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    loaded = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float64)
    bare = GPT2LMHeadModel(GPT2Config.from_pretrained(tuned)).double().eval()
    weights = load_file(tuned / "model.safetensors")
    with torch.no_grad():
        for name, parameter in bare.named_parameters():
            parameter.copy_(weights[name])
        tokens = torch.arange(1, 9)[None]
        logits = loaded(tokens).logits
        assert torch.equal(logits, bare(tokens).logits)
    assert (logits.argmax(-1)[0, :-1] == tokens[0, 1:]).float().mean() >= 0.7  # it knows the texts


@pytest.mark.slow
@PEFTS_OWN
@pytest.mark.parametrize("adapters", [(), ("--lora-rank", "4", "--save-trainable-only")])
def test_a_killed_run_goes_on_bit_for_bit(
    adapters: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    args = flags(folder, "--max-steps", "8", "--save-every", "3", *adapters)
    shipped.assert_goes_on_bit_for_bit("finetune_hf", *args, tmp_path=tmp_path, deaths="5:1")


@pytest.mark.slow
def test_exact_is_bitwise_on_one_two_and_four_ranks(folder: Path, tmp_path: Path) -> None:
    args = flags(folder, "--max-steps", "4", "--global-batch", "16", "--micro-batch", "4")
    shipped.assert_exact("finetune_hf", *args, tmp_path=tmp_path)
