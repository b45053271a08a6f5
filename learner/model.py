"""One frozen base model, and low-rank adapters of it that take turns, such as the policy's, or none.

The base's weights exist once: the engine that makes the rollouts runs a twin of it, a second module over the same storage.

Axes: B replies, T positions of a padded batch, N tokens of a list, H hidden width, V vocabulary, r rank, I in, O out.
Batches are padded on the right, so that causality alone keeps the padding from the real tokens. They lie on the CPU, and so
does what is made of them; only hidden states of whole batches stay where the base is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from learner import ppo
from learner.judgement import Tokens
from serving.lora import AdapterWeights, target_modules


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts with their replies, padded on the right."""

    ids_BT: Tensor
    mask_BT: Tensor
    """True where a token belongs to the reply."""
    lengths: tuple[int, ...]
    """Tokens of each row, prompt and reply."""

    @classmethod
    def of(cls, samples: Sequence[Tokens]) -> Batch:
        """Stack samples; whatever id pads them is never attended to."""
        lengths = tuple(len(sample.prompt_ids) + len(sample.reply_ids) for sample in samples)
        ids_BT = torch.zeros(len(samples), max(lengths), dtype=torch.long)
        mask_BT = torch.zeros(len(samples), max(lengths), dtype=torch.bool)
        for row, (sample, end) in enumerate(zip(samples, lengths, strict=True)):
            ids_BT[row, :end] = torch.tensor((*sample.prompt_ids, *sample.reply_ids))
            mask_BT[row, len(sample.prompt_ids) : end] = True
        return cls(ids_BT, mask_BT, lengths)

    def rows(self, rows: Sequence[int]) -> Batch:
        """Some of the rows, cut to the longest of them."""
        lengths = tuple(self.lengths[row] for row in rows)
        index = list(rows)
        return Batch(self.ids_BT[index, : max(lengths)], self.mask_BT[index, : max(lengths)], lengths)

    @property
    def before_BT(self) -> Tensor:
        """True at the position before each reply token: the state in which that token is said."""
        return torch.cat([self.mask_BT[:, 1:], torch.zeros_like(self.mask_BT[:, :1])], 1)

    def spread(self, values_N: Tensor) -> Tensor:
        """A value for each reply token, in order, put where that token stands; 0 elsewhere, [B, T]."""
        return values_N.new_zeros(self.mask_BT.shape).masked_scatter(self.mask_BT, values_N)


def length_sorted(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in groups of like length, each of at most `max_tokens` padded tokens (or one row)."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if group and lengths[index] * (len(group) + 1) > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Comparison:
    """What an adapter and the bare base make of the same replies."""

    new_BT: Tensor
    """log p of each reply token under the adapter; 0 elsewhere."""
    base_BT: Tensor
    kl_BT: Tensor
    """KL(adapter ‖ base) over the full vocabulary, of each reply token."""
    hidden_NH: Tensor
    """The adapter's last hidden state before each reply token, fp32, on the CPU."""
    states_BS: Tensor
    """What `LearnerModel.states` says of the replies."""


class Adapter(nn.Module):
    """Low-rank additions to the linear layers of the base: x ↦ Wx + scaling·B(Ax). Fresh, B is 0 and nothing changes."""

    def __init__(self, targets: Mapping[str, tuple[int, int]], rank: int, scaling: float, seed: int) -> None:
        super().__init__()
        self.paths = {path: index for index, path in enumerate(targets)}
        self.rank, self.scaling = rank, scaling
        self.down = nn.ParameterList(torch.empty(rank, inputs) for inputs, _ in targets.values())
        self.up = nn.ParameterList(torch.empty(outputs, rank) for _, outputs in targets.values())
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Make it fresh: PEFT's initialisation (A uniform, B zero), from its own random numbers."""
        generator = torch.Generator().manual_seed(seed)
        for down_rI, up_Or in zip(self.down, self.up, strict=True):
            bound = 1 / math.sqrt(down_rI.shape[1])
            down_rI.copy_(torch.empty(down_rI.shape).uniform_(-bound, bound, generator=generator))
            up_Or.zero_()

    def forward(self, path: str, inputs: Tensor) -> Tensor:
        """What the adapter adds to the output of the layer at `path`."""
        index = self.paths[path]
        low = functional.linear(inputs.to(self.down[index].dtype), self.down[index]) * self.scaling
        return functional.linear(low, self.up[index])

    @torch.no_grad()
    def weights(self) -> AdapterWeights:
        """A copy of the weights, in the form that the engine and the adapter store take."""
        down, up = ([matrix.detach().cpu().clone() for matrix in matrices] for matrices in (self.down, self.up))
        tensors = {path: (down[index], up[index]) for path, index in self.paths.items()}
        return AdapterWeights(rank=self.rank, scaling=self.scaling, tensors=tensors)

    @torch.no_grad()
    def load(self, weights: AdapterWeights) -> None:
        """Take over weights of the same rank or a lower one, on these layers or some of them; raises ValueError on others."""
        if not set(weights.tensors) <= set(self.paths) or weights.rank > self.rank:
            raise ValueError(
                f"the adapter has rank {weights.rank} on {len(weights.tensors)} layers; "
                f"this learner trains rank {self.rank} on {len(self.paths)} layers"
            )
        for path, index in self.paths.items():
            self.up[index].zero_()
            if path in weights.tensors:
                down_rI, up_Or = weights.tensors[path]
                rank = len(down_rI)  # of this layer: it may be lower than that of others
                self.down[index][:rank].copy_(down_rI)
                self.up[index][:, :rank].copy_(up_Or * (weights.scaling_of(path) / self.scaling))


class LearnerModel(nn.Module):
    """The frozen base with named adapters, at most one of them active at a time.

    `checkpointing` trades a second forward pass for the memory of the first one's activations.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        names: Sequence[str],
        *,
        rank: int,
        scaling: float,
        seed: int,
        chunk_tokens: int = 4096,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.chunk_tokens = chunk_tokens
        self.width = int(base.get_input_embeddings().get_parameter("weight").shape[1])
        self._turn = threading.local()
        modules = {path: base.get_submodule(path) for path in target_modules(base)}
        self.targets = {path: _shape(module) for path, module in modules.items()}
        self.adapters = nn.ModuleDict(
            {name: Adapter(self.targets, rank, scaling, seed + index) for index, name in enumerate(names)}
        )
        self.adapters.to(base.device)
        for path, module in modules.items():
            module.register_forward_hook(partial(self._add_adapter, path))
        if checkpointing:
            self._checkpoint_layers()

    def _add_adapter(self, path: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.active is None:
            return output
        added: Tensor = self.adapters[self.active](path, inputs[0])
        return output + added.to(output.dtype)

    def _checkpoint_layers(self) -> None:
        # A layer is run again inside backward, when another adapter may have its turn: the contexts bring back its own.
        save = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self.using(self.active)))
        for layer in self.base.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = save  # type: ignore[assignment]
                layer.training = True  # they save in training only; the dropout inside them stays off

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; raises KeyError on another."""
        adapter = self.adapters[name]
        assert isinstance(adapter, Adapter)
        return adapter

    @property
    def active(self) -> str | None:
        """The adapter whose turn it is in this thread; None is the bare base, the reference."""
        active: str | None = getattr(self._turn, "active", None)
        return active

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Forward passes of this thread inside the block go through this adapter; other threads may use another."""
        before, self._turn.active = self.active, name
        try:
            yield
        finally:
            self._turn.active = before

    def hidden(self, batch: Batch, adapter: str | None) -> Tensor:
        """The last hidden state of every position, [B, T, H]."""
        ids_BT = batch.ids_BT.to(self.base.device)
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        with self.using(adapter):
            output = self.base.base_model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False)
        hidden_BTH: Tensor = output.last_hidden_state
        return hidden_BTH

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Of the bare base's last hidden states, which know the prompt: their mean over the reply and the one at its end.

        [B, 2H], fp32, on the CPU.
        """
        return _states(batch, self.hidden(batch, None))

    def logits(self, hidden_NH: Tensor, temperature: float = 1.0) -> Tensor:
        """fp32 logits over the vocabulary, [N, V], of the distribution that this temperature samples from."""
        logits_NV: Tensor = self.base.get_output_embeddings()(hidden_NH)
        return logits_NV.float() if temperature == 1 else logits_NV.float() / temperature

    def logprobs(self, batch: Batch, adapter: str | None, temperature: float = 1.0) -> Tensor:
        """log p of each reply token, fp32, [B, T]; 0 elsewhere. The vocabulary is never held for all tokens at once."""
        return batch.spread(self._each_token(batch, adapter, partial(self._said, temperature=temperature)))

    def logprobs_and_entropy(self, batch: Batch, adapter: str, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As `logprobs`, and the entropy of the distribution that each token was drawn from, nats, [B, T]; 0 elsewhere."""
        said_N, entropy_N = self._each_token(batch, adapter, partial(self._said_of, temperature=temperature))
        return batch.spread(said_N), batch.spread(entropy_N)

    def _each_token(self, batch: Batch, adapter: str | None, what: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`what` of the hidden state before each reply token and the token's id, in chunks; tokens stand last."""
        hidden_NH = self.hidden(batch, adapter)[batch.before_BT]
        ids_N = batch.ids_BT[batch.mask_BT].to(hidden_NH.device)
        chunks = zip(hidden_NH.split(self.chunk_tokens), ids_N.split(self.chunk_tokens), strict=True)
        if len(ids_N) > self.chunk_tokens and torch.is_grad_enabled():
            parts = [checkpoint(what, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [what(*chunk) for chunk in chunks]
        return torch.cat(parts, -1).cpu()

    def _said(self, hidden_NH: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
        return -functional.cross_entropy(self.logits(hidden_NH, temperature), ids_N, reduction="none")

    def _said_of(self, hidden_NH: Tensor, ids_N: Tensor, temperature: float) -> Tensor:
        logprobs_NV = self.logits(hidden_NH, temperature).log_softmax(-1)
        said_N = logprobs_NV.gather(1, ids_N[:, None])[:, 0]
        return torch.stack([said_N, -(logprobs_NV.exp() * logprobs_NV).sum(-1)])

    @torch.no_grad()
    def compare(self, batch: Batch, adapter: str, temperature: float = 1.0) -> Comparison:
        """An adapter beside the bare base, from one forward pass of each; both at this temperature."""
        before_BT, ids_N = batch.before_BT, batch.ids_BT[batch.mask_BT].to(self.base.device)
        base_BTH = self.hidden(batch, None)
        new_NH, base_NH = self.hidden(batch, adapter)[before_BT], base_BTH[before_BT]
        parts = []
        for ids, new, base in zip(*(t.split(self.chunk_tokens) for t in (ids_N, new_NH, base_NH)), strict=True):
            new_NV, base_NV = self.logits(new, temperature), self.logits(base, temperature)
            logprobs = (-functional.cross_entropy(logits, ids, reduction="none") for logits in (new_NV, base_NV))
            parts.append(torch.stack([*logprobs, ppo.full_kl(new_NV, base_NV)]))
        new_N, base_N, kl_N = torch.cat(parts, 1).cpu()
        new_BT, base_BT, kl_BT = map(batch.spread, (new_N, base_N, kl_N))
        return Comparison(new_BT, base_BT, kl_BT, new_NH.float().cpu(), _states(batch, base_BTH))

    @torch.no_grad()
    def full_kl(self, batch: Batch, adapter: str) -> tuple[Tensor, Tensor]:
        """KL(adapter ‖ base) over the whole vocabulary, summed over each reply, [B], in nats; and `states`, [B, 2H]."""
        reference_BTH = self.hidden(batch, None)
        new_NH, base_NH = self.hidden(batch, adapter)[batch.before_BT], reference_BTH[batch.before_BT]
        chunks = zip(new_NH.split(self.chunk_tokens), base_NH.split(self.chunk_tokens), strict=True)
        kl_N = torch.cat([ppo.full_kl(self.logits(new), self.logits(base)) for new, base in chunks])
        return batch.spread(kl_N.cpu()).sum(1), _states(batch, reference_BTH)


def _states(batch: Batch, hidden_BTH: Tensor) -> Tensor:
    hidden_BTH = hidden_BTH.float().cpu()
    reply_BT1 = batch.mask_BT[..., None]
    mean_BH = torch.where(reply_BT1, hidden_BTH, 0).sum(1) / reply_BT1.sum(1)
    end_BH = hidden_BTH[torch.arange(len(batch.lengths)), torch.tensor(batch.lengths) - 1]
    return torch.cat([mean_BH, end_BH], 1)


def _shape(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2 keeps its weights the other way round."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inputs, outputs = module.get_parameter("weight").shape
    return int(inputs), int(outputs)
