"""How the built-in base model is made: a tokenizer, a small Llama, and the numbers on its card.

`pretrain` writes a directory that `AutoTokenizer` and `AutoModelForCausalLM` load. The same seed, sizes and thread
count give the same bytes. It learns the dialogues of `learner/corpus.py`, or whatever `corpus_files` hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from learner import card, corpus
from learner.card import measure
from learner.tokens import END, MAX_LENGTH, PAD, encode, make_tokenizer, read_corpus

Progressed = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the model and length of its training. The defaults are the built-in model's."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 512
    vocabulary: int = 3072  # entries, special tokens included
    steps: int = 3600
    tokens: int = 3072  # a step, padding included
    lr: float = 0.01  # the peak, Muon's
    lr_embeddings: float = 0.008  # the peak, AdamW's: embeddings and norms
    sharpness: float = 1.4  # what the last norm is scaled by when training is done: 1 leaves the model as trained
    tokenizer_chats: int = 30_000  # conversations the tokenizer is made from
    pool: int = 4096  # conversations sorted by length together, so that little is padding


def _batches(
    tokenizer: PreTrainedTokenizerFast, chats: Iterator[corpus.Chat], size: Size, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids_BT, weights_BT) of chats of like length; weights are 0 on padding."""
    pad = _id(tokenizer, PAD)
    while pool := encode(tokenizer, list(itertools.islice(chats, size.pool))):
        pool.sort(key=lambda row: len(row[0]))
        batches: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in pool:
            if batches[-1] and len(row[0]) * (len(batches[-1]) + 1) > size.tokens:
                batches.append([])
            batches[-1].append(row)
        rng.shuffle(batches)
        for batch in batches:
            longest = max(len(ids) for ids, _ in batch)
            ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
            weights_BT = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in batch])
            yield ids_BT, weights_BT


def _gradients(
    model: LlamaForCausalLM, ids_BT: torch.Tensor, weights_BT: torch.Tensor, total: float
) -> tuple[float, Sequence[torch.Tensor]]:
    """Negative log-likelihood, weighted and divided by `total`, and its gradients; logits are made only where they count.

    With bfloat16 products and fp32 weights. Several threads may call it at once, since it leaves the model as it is.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_BTH = model.model(input_ids=ids_BT[:, :-1]).last_hidden_state
        weights = weights_BT[:, 1:].flatten()
        counted = weights > 0
        logits = model.lm_head(hidden_BTH.flatten(0, 1)[counted]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids_BT[:, 1:].flatten()[counted], reduction="none")
    loss = (losses * weights[counted]).sum() / total
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: up over a fiftieth, held to two fifths, then a cosine down to zero."""
    warm, hold = max(1, steps // 50), int(steps * 0.4)
    if step < hold:
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - hold) / (steps - hold)))


def train(
    tokenizer: PreTrainedTokenizerFast,
    chats: Iterator[corpus.Chat],
    size: Size,
    seed: int,
    threads: int,
    progress: Progressed,
) -> LlamaForCausalLM:
    """A fresh model after `size.steps` steps.

    Muon for the matrices, AdamW for embeddings and norms: after 50 steps the loss is 3.4 where AdamW alone has 5.3.
    Each thread takes rows of its own through the whole model: on two cores that is a third faster than sharing each product.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer, size))
    model.set_attn_implementation("eager")  # on short rows its backward pass is faster than the fused one
    model.train()
    parameters = list(model.parameters())
    optimisers = _optimisers(model, size, threads)
    batches = _batches(tokenizer, chats, size, random.Random(seed))
    with ThreadPoolExecutor(threads) as pool:
        for step in range(size.steps):
            ids_BT, weights_BT = next(batches)
            total = float(weights_BT[:, 1:].sum())
            shares = [
                (ids_BT[first::threads], weights_BT[first::threads]) for first in range(min(threads, len(ids_BT)))
            ]
            parts = [pool.submit(_gradients, model, *share, total) for share in shares]
            losses, gradients = zip(*(part.result() for part in parts), strict=True)
            for parameter, grads in zip(parameters, zip(*gradients, strict=True), strict=True):
                parameter.grad = torch.stack(grads).sum(0) if len(grads) > 1 else grads[0]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            share = schedule(step, size.steps)
            for optimiser, peak in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = peak * share
            list(pool.map(lambda pair: pair[0].step(), optimisers))
            progress(f"training, loss {sum(losses):.3f}", step + 1, size.steps)
    sharpen(model, size.sharpness)
    model.eval()
    return model


@torch.no_grad()
def sharpen(model: LlamaForCausalLM, sharpness: float) -> None:
    """Scale the last norm, and so every logit: sampling at T=1 is then as sampling the trained model at 1 / sharpness.

    A model this small and this briefly trained leaves some probability on tokens that never fit, and one of them spoils
    a reply. Measured on the built-in model (800 replies) at 1.0, 1.3, 1.4, 1.5, 1.7: well-formed .854 .946 .964 .969 .970,
    facts right .936 .962 .973 .965 .978, but question .43 .36 .32 .30 .26: beyond 1.4 the manners leave their bounds.
    """
    model.model.norm.weight.mul_(sharpness)


def _optimisers(model: LlamaForCausalLM, size: Size, threads: int) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimiser with its peak learning rate; the matrices are shared out, so that all threads have some."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    muons = [
        torch.optim.Muon(matrices[first::threads], lr=size.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
        for first in range(min(threads, len(matrices)))
    ]
    adamw = torch.optim.AdamW(others, lr=size.lr_embeddings, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [*((muon, size.lr) for muon in muons), (adamw, size.lr_embeddings)]


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), token
    return found


def _config(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_id(tokenizer, END),
        pad_token_id=_id(tokenizer, PAD),
        dtype="float32",
    )


def pretrain(
    out: Path,
    *,
    seed: int = 0,
    size: Size | None = None,
    corpus_files: Sequence[Path] | None = None,
    threads: int = 2,
    samples: int = 1000,
    progress: Progressed | None = None,
) -> None:
    """Make a base model in `out`, whole or not at all: weights, config, tokenizer, prompts and model card.

    `progress(what, done, total)` is called on every step; None draws a bar. Raises ValueError for a corpus file that
    cannot be used, FileExistsError if `out` holds something other than a model.
    """
    if progress is None:
        with _bar() as draw:
            return pretrain(
                out,
                seed=seed,
                size=size,
                corpus_files=corpus_files,
                threads=threads,
                samples=samples,
                progress=draw,
            )
    size = size or Size()
    began = time.monotonic()
    if out.exists() and any(out.iterdir()) and not (out / "config.json").exists():
        raise FileExistsError(f"{out} exists and holds no model; name a new or empty directory")
    chats, prompts = _material(seed, corpus_files)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of each of the `threads` that train
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        with torch.random.fork_rng(devices=[]):
            progress("tokenizer", 0, size.steps)
            first = list(itertools.islice(chats, size.tokenizer_chats))
            texts = (message["content"] for chat in first for message in chat)
            tokenizer = make_tokenizer(texts, size.vocabulary)
            model = train(tokenizer, itertools.chain(first, chats), size, seed, threads, progress)
        minutes = (time.monotonic() - began) / 60
        _save(made, model, tokenizer, prompts)
        numbers = measure(made, samples=samples, seed=seed) if corpus_files is None and samples else None
        text = card.model_card(
            numbers,
            seed=seed,
            minutes=minutes,
            parameters=model.num_parameters(),
            steps=size.steps,
            threads=threads,
            sharpness=size.sharpness,
            source="the dialogues of learner/corpus.py" if corpus_files is None else f"{len(corpus_files)} files",
        )
        (made / "README.md").write_text(text, "utf-8")
        _swap(made, out)
    finally:
        torch.set_num_threads(before)
        shutil.rmtree(made, ignore_errors=True)


def _material(seed: int, files: Sequence[Path] | None) -> tuple[Iterator[corpus.Chat], list[str]]:
    """Chats without end, and prompts to try the model on."""
    if files is None:
        return corpus.dialogues(seed, 2**40), corpus.heldout_prompts()
    chats = read_corpus(files)
    asked = (message["content"] for chat in chats for message in chat[:2] if message["role"] == "user")
    rng = random.Random(seed)
    endless = itertools.chain.from_iterable(rng.sample(chats, len(chats)) for _ in itertools.count())
    return endless, list(dict.fromkeys(asked))[:200]


def _save(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> None:
    ids = {"eos_token_id": model.config.eos_token_id, "pad_token_id": model.config.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "prompts.json").write_text(json.dumps(prompts, ensure_ascii=False, indent=1) + "\n", "utf-8")


def _swap(made: Path, out: Path) -> None:
    """Put `made` in the place of `out`; the old one goes only when the new one stands."""
    made.chmod(0o755)
    for file in made.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner only
    if out.exists():
        old = made.with_name(made.name + "-old")
        out.rename(old)
        made.rename(out)
        shutil.rmtree(old)
    else:
        made.rename(out)


@contextmanager
def _bar() -> Iterator[Progressed]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("corpus", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the built-in base model, or measure one.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Size().steps)
    parser.add_argument("--corpus", type=Path, nargs="*", help="text or JSON Lines of chats, instead of the own corpus")
    parser.add_argument("--measure", action="store_true", help="only measure the model in --out; prints JSON")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.out, seed=given.seed), indent=1))
    else:
        pretrain(given.out, seed=given.seed, size=Size(steps=given.steps), corpus_files=given.corpus)


if __name__ == "__main__":
    main()
