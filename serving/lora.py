"""Adapter slots on an unmodified Hugging Face model: several LoRA adapters stay loaded, each row of a batch picks one.

Beside the target linears lie stacked `A[S, R, in]` and `B[S, R, out]` for S slots; those that read the same input (q, k
and v; gate and up) share one A and one B, so that they cost as much as one. A forward multiplies the slots in use with
every row, and puts zero where a row uses another slot: `masked_fill`, since 0 · NaN is NaN, and adapters must be finite.
The native step (serving/step.c) reads the same stacks, for each token its own slot alone.
So nothing that one adapter makes can reach a neighbour. While no slot is in use, adapters cost nothing.

Axes: N tokens of all rows of a forward, I inputs and O outputs of a layer, S slots, R ranks of all layers that share.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.products import siblings
from serving.sites import Selection, Site


@dataclass(frozen=True)
class AdapterWeights:
    """One LoRA adapter in memory, fp32."""

    rank: int
    """The largest rank of its modules."""
    scaling: float | Mapping[str, float]
    """What B·A is multiplied by (alpha/r, or alpha/√r for rslora); per module path where they differ."""
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    """Module path, as in the base's `named_modules()`, to (A [rank, in], B [out, rank])."""

    def scaling_of(self, path: str) -> float:
        return self.scaling if isinstance(self.scaling, int | float) else self.scaling[path]


def target_modules(model: PreTrainedModel) -> list[str]:
    """Paths of all linear layers (nn.Linear, GPT-2's Conv1D) but the output head: where adapters go."""
    head = model.get_output_embeddings()
    return [path for path, module in model.named_modules() if _is_linear(module) and module is not head]


def _is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear | Conv1D]:
    """True for plain linear layers; subclasses with a forward of their own (a router, say) do something else."""
    return module is not None and type(module).forward in (nn.Linear.forward, Conv1D.forward)


class Unfit(ValueError):
    """Adapter weights that do not fit the slots; the message says why, and what would."""


class Slots:
    """S adapters beside each target module of one model. Not thread-safe: one forward at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        targets: Collection[str],
        count: int = 4,
        rank: int = 16,
        *,
        packed: bool = False,
    ) -> None:
        """Wrap the forward of each target module. Raises ValueError for a target that is no linear layer.

        `packed`: put layers that read the same input into one product, and lay the weights of all linear layers out for
        the processor. That is a copy of them; without it the model's own weights are used as they lie.
        """
        self.count, self.rank = count, rank
        self._selection = Selection(count, model.device)
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None
        modules = dict(model.named_modules())
        for path in targets:
            if not _is_linear(modules.get(path)):
                allowed = target_modules(model)
                raise ValueError(f"{path!r} is no linear layer of {type(model).__name__}; allowed: {allowed}")
        self._sites: dict[str, tuple[Site, int]] = {}
        for paths in siblings(model, targets):
            members = [modules[path] for path in paths]
            site = Site(members, count, rank, self._selection, packed=packed)
            self._sites |= {path: (site, i) for i, path in enumerate(paths)}
        self._all = list(dict.fromkeys(site for site, _ in self._sites.values()))
        head = model.get_output_embeddings()
        if packed and _is_linear(head):
            self._all.append(Site([head], 0, 0, self._selection, packed=True))

    @property
    def targets(self) -> Collection[str]:
        """Paths of the modules that have slots."""
        return self._sites.keys()

    @property
    def copied_bytes(self) -> int:
        """Memory of the weights that were laid out anew."""
        return sum(site.copied_bytes for site in self._all)

    @torch.no_grad()
    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a slot, scaling folded into B, smaller ranks padded with zeros.

        On a GPU the steps of others need not wait for it. Raises Unfit for an unknown module, a wrong shape, too large a
        rank or what is not finite; the slot is then unchanged.
        """
        fitting = {path: self._fitting(path, *pair, weights.scaling_of(path)) for path, pair in weights.tensors.items()}
        with self._aside():
            for path, (site, member) in self._sites.items():
                site.clear(slot, member)
                if path in fitting:
                    site.write(slot, member, *fitting[path])

    def clear(self, slot: int) -> None:
        """Make a slot the base again."""
        for site, member in self._sites.values():
            site.clear(slot, member)

    @contextmanager
    def chosen(self, slot_of_row: Sequence[int], width: int) -> Iterator[None]:
        """Within, each row of a forward uses its slot, BASE for none; `width` is the forward's tokens a row."""
        self._selection.choose(tuple(slot_of_row), width)
        with self._running():
            yield

    @contextmanager
    def chosen_on_device(self, slot_N1: Tensor | None) -> Iterator[None]:
        """As `chosen`, for one token a row, without a look at which slots these are: all are multiplied, or none."""
        self._selection.choose_any(slot_N1)
        with self._running():
            yield

    def product(self, paths: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """What these modules make of one input within `chosen`, adapters included, side by side in the last axis.

        Raises ValueError when these are not what is multiplied together, in this order.
        """
        return self._together(paths).product

    def stacks(self, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A [S, R, in] and B [S, R, out] of these modules, one after another, as they are kept.

        Raises ValueError like `product`.
        """
        site = self._together(paths)
        return site.a_SRI, site.b_SRO

    def remove(self) -> None:
        """Give the model its own forwards back."""
        for site in self._all:
            site.remove()
        self._sites.clear()
        self._all.clear()

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within, what this thread asks of a GPU runs beside the steps; done when this ends."""
        if self._stream is None:
            yield
            return
        # what was asked before, such as clearing the same slot, comes first
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()

    @contextmanager
    def _running(self) -> Iterator[None]:
        self._selection.forwards += 1
        self._selection.running = True
        try:
            yield
        finally:
            self._selection.running = False

    def _together(self, paths: Sequence[str]) -> Site:
        found = self._sites.get(paths[0])
        if found is None or [path for path, (site, _) in self._sites.items() if site is found[0]] != list(paths):
            raise ValueError(f"{list(paths)} are not what is multiplied together")
        return found[0]

    def _fitting(self, path: str, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """A and B as the slots hold them, or Unfit."""
        if path not in self._sites:
            raise Unfit(f"the adapter changes {path!r}, which has no slot; allowed: {sorted(self._sites)}.")
        site, member = self._sites[path]
        rank, outputs = a.shape[0], site.outputs[member]
        if tuple(a.shape) != (rank, site.inputs) or tuple(b.shape) != (outputs, rank):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            expected = f"A ({rank}, {site.inputs}) and B ({outputs}, {rank})"
            raise Unfit(f"{path}: {shapes} do not fit; expected {expected}.")
        if rank > self.rank:
            raise Unfit(f"{path}: rank {rank} is above the slots' rank; allowed: at most {self.rank}.")
        a, b = a.to(site.dtype), (b * scaling).to(site.dtype)
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise Unfit(f"{path}: A or B holds numbers that are not finite as {site.dtype}.")
        return a, b
