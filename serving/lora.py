"""Adapter slots on an unmodified Hugging Face model: several LoRA adapters stay loaded, and each row of a batch picks one.

Beside each target linear lie stacked `A[S, rank, in]` and `B[S, out, rank]` for S slots. A forward adds B·A·x for the rows of a slot
and touches no other row: nothing that one adapter holds, not even NaN, can reach a neighbour. Rows on the base cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

BASE = -1
"""The slot index of rows that use no adapter."""

Rows = slice | Tensor
"""Which rows of a batch a slot applies to: a slice where they lie together (a view), else their indices."""


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
    return [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


class Slots:
    """S adapters beside each target module of one model. Not thread-safe: one forward at a time."""

    def __init__(self, model: PreTrainedModel, targets: Collection[str], count: int = 4, rank: int = 16) -> None:
        """Wrap the forward of each target module. Raises ValueError for a target that is no linear layer of the model."""
        self.count, self.rank = count, rank
        self._sites: dict[str, _Site] = {}
        modules = dict(model.named_modules())
        for path in targets:
            module = modules.get(path)
            if not isinstance(module, nn.Linear | Conv1D):
                raise ValueError(
                    f"{path!r} is no linear layer of {type(model).__name__}; allowed: {target_modules(model)}"
                )
            self._sites[path] = _Site(module, count, rank)
        self._chosen: tuple[int, ...] | None = None
        self.select(())

    def write(self, slot: int, weights: AdapterWeights) -> None:
        """Copy an adapter into a slot, scaling folded into B, smaller ranks padded with zeros.

        Raises ValueError for an unknown module, a wrong shape or too large a rank; the slot is then unchanged.
        """
        for path, (a, b) in weights.tensors.items():
            self._check(path, a, b)
        for path, site in self._sites.items():
            if path in weights.tensors:
                site.write(slot, *weights.tensors[path], weights.scaling_of(path))
            else:
                site.clear(slot)

    def clear(self, slot: int) -> None:
        """Make a slot the base again."""
        for site in self._sites.values():
            site.clear(slot)

    def select(self, slot_of_row: Sequence[int]) -> None:
        """Choose the slot of each row of the forwards that follow; BASE for none. An empty sequence: the base for all."""
        chosen = tuple(slot_of_row)
        if chosen == self._chosen:
            return
        self._chosen = chosen
        parts = [(slot, _rows_of(slot, chosen)) for slot in sorted(set(chosen) - {BASE})]
        for site in self._sites.values():
            site.select(parts)

    def remove(self) -> None:
        """Give the model its own forwards back."""
        for site in self._sites.values():
            site.remove()
        self._sites.clear()

    def _check(self, path: str, a: Tensor, b: Tensor) -> None:
        site = self._sites.get(path)
        if site is None:
            raise ValueError(f"the adapter changes {path!r}, which has no slot; allowed: {sorted(self._sites)}")
        rank = a.shape[0]
        if tuple(a.shape) != (rank, site.inputs) or tuple(b.shape) != (site.outputs, rank):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            raise ValueError(
                f"{path}: {shapes} do not fit; expected A ({rank}, {site.inputs}) and B ({site.outputs}, {rank})"
            )
        if rank > self.rank:
            raise ValueError(f"{path}: rank {rank} is above the slots' rank; allowed: at most {self.rank}")


def _rows_of(slot: int, chosen: tuple[int, ...]) -> Rows:
    rows = [i for i, s in enumerate(chosen) if s == slot]
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


class _Site:
    """One target module with its stacked adapters."""

    def __init__(self, module: nn.Linear | Conv1D, count: int, rank: int) -> None:
        if "forward" in vars(module):
            raise ValueError("this model already carries adapter slots; close their engine first")
        weight = module.weight
        self.outputs, self.inputs = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
        self.a = torch.zeros(count, rank, self.inputs, device=weight.device)
        self.b = torch.zeros(count, self.outputs, rank, device=weight.device)
        self._module = module
        self._parts: list[tuple[Tensor, Tensor, Rows]] = []
        module.forward = self._wrap(module.forward)

    def write(self, slot: int, a: Tensor, b: Tensor, scaling: float) -> None:
        self.clear(slot)
        rank = a.shape[0]
        self.a[slot, :rank].copy_(a)
        self.b[slot, :, :rank].copy_(b).mul_(scaling)

    def clear(self, slot: int) -> None:
        self.a[slot].zero_()
        self.b[slot].zero_()

    def select(self, parts: Sequence[tuple[int, Rows]]) -> None:
        self._parts = [(self.a[slot].T, self.b[slot].T, rows) for slot, rows in parts]

    def remove(self) -> None:
        del self._module.forward

    def _wrap(self, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            y = base_forward(x)
            for a_IR, b_RO, rows in self._parts:
                _add(y, x, a_IR, b_RO, rows)
            return y

        return forward


def _add(y: Tensor, x: Tensor, a_IR: Tensor, b_RO: Tensor, rows: Rows) -> None:
    """y[rows] += (x[rows] · A) · B in fp32, in place; x [B, T, in] or [B, in], y likewise."""
    part = x[rows]
    low = part.reshape(-1, part.shape[-1]).float() @ a_IR
    if isinstance(rows, Tensor):
        y.index_add_(0, rows, (low @ b_RO).view(*part.shape[:-1], -1).to(y.dtype))
    elif y.dtype == torch.float32:
        y[rows].view(-1, y.shape[-1]).addmm_(low, b_RO)
    else:
        y[rows] += (low @ b_RO).view(*part.shape[:-1], -1).to(y.dtype)
