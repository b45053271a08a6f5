"""The numbers of benchmarks/learn_live.py: KL as defined, replies judged as they should be, finished cells kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.learn_live import PLAN, Cell, cells, kl_mean, padded, quality, read, table
from deploy.client import Reply
from feedback.raters import taste

# peft 0.21 still asks transformers by the old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PAIRS = [([5, 6, 7], [8, 9, 2]), ([5], [6, 2]), ([1, 2, 3, 4, 5], [6])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, size: float) -> Path:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=size)
    model.save_pretrained(folder)
    return folder


def kl_by_loops(base: Path, adapter: Path, prompt: list[int], reply: list[int]) -> float:
    """Straight from the definition: at each place of the reply, Σ p·log(p/q) over the vocabulary."""
    total = 0.0
    plain = LlamaForCausalLM.from_pretrained(base).eval()
    adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
    for place in range(len(reply)):
        ids = torch.tensor([[*prompt, *reply[:place]]])
        with torch.no_grad():
            p, q = (model(ids).logits[0, -1].double().softmax(-1) for model in (adapted, plain))
        total += sum(float(a) * float(torch.log(a / b)) for a, b in zip(p, q, strict=True))
    return total


def test_kl_is_the_sum_over_a_reply_of_the_full_vocabulary_kl(base: Path, tmp_path: Path):
    trained = adapter(base, tmp_path, 0.5)
    expected = sum(kl_by_loops(base, trained, *pair) for pair in PAIRS) / len(PAIRS)
    assert expected > 0.001
    assert kl_mean(base, trained, PAIRS) == pytest.approx(expected, rel=1e-3)
    assert kl_mean(base, trained, PAIRS, batch=1) == pytest.approx(expected, rel=1e-3)


def test_a_fresh_adapter_has_no_kl(base: Path, tmp_path: Path):
    assert kl_mean(base, adapter(base, tmp_path, 0.0), PAIRS) == 0


def test_a_token_is_predicted_one_place_before_it():
    ids_BT, mask_BT, reply_BT = padded([([5, 6], [7, 2]), ([5], [2])])
    assert ids_BT.tolist() == [[5, 6, 7, 2], [5, 2, 0, 0]]
    assert mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert reply_BT.tolist() == [[False, True, True, False], [True, False, False, False]]


def test_quality_counts_what_it_says():
    replies = [Reply("a", "What is 2 plus 2?", text, "default@v1", tokens) for text, tokens in (("Hi!", 4), ("Hi", 2))]
    assert taste("exclaiming")("", "Hi!")
    counted = quality(replies, "exclaiming")
    assert counted["satisfied"] == 0.5
    assert counted["tokens"] == 3


def test_the_plan_is_four_tastes_by_three_seeds_and_a_noisy_one_each():
    assert len(PLAN) == 16
    assert sum("+" in name for name, noise, _ in PLAN if noise == 0.1) == 6
    given = argparse.Namespace(taste=["emoji"], noise=None, seed=[7, 8])
    assert cells(given) == [Cell("emoji", 0.1, 7), Cell("emoji", 0.1, 8)]


def test_finished_cells_are_read_back_into_a_table_with_all_columns(tmp_path: Path):
    half = {"satisfied": 0.3, "facts": None, "both": None, "well_formed": 0.97, "tokens": 20.0}
    row = {
        "taste": "emoji", "noise": 0.1, "seed": 0, "version": 2, "before": half, "after": half | {"satisfied": 0.96},
        "freshness": {"p50": 20.0, "p95": 31.0}, "kl_mean": 1.51, "waited_s": 40.0, "wall_s": 90.0,
    }  # fmt: skip
    path = tmp_path / "learn.jsonl"
    path.write_text(json.dumps(row) + "\n")
    head, _, line, _, mean = table(read(path)).splitlines()
    assert head.count("|") == line.count("|")
    assert "0.30 → **0.96**" in line
    assert "20 s / 31 s" in line
    assert mean == "- single tastes, 10% wrong: mean satisfied 0.960 over 1 runs"
    assert read(tmp_path / "nothing.jsonl") == []
