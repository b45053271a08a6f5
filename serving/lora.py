"""Adapter slots on an unmodified Hugging Face model: several LoRA adapters stay loaded, each row of a batch picks one.

Beside each target linear lie stacked `A[S, rank, in]` and `B[S, out, rank]` for S slots. A forward adds B·A·x for the
rows of a slot and touches no other row: nothing that one adapter holds, not even NaN, can reach a neighbour. Rows on
the base cost nothing.
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
    return [path for path, module in model.named_modules() if _is_linear(module) and module is not head]


def _is_linear(module: nn.Module | None) -> TypeGuard[nn.Linear | Conv1D]:
    """True for plain linear layers; subclasses with a forward of their own (a router, say) do something else."""
    return module is not None and type(module).forward in (nn.Linear.forward, Conv1D.forward)


class Slots:
    """S adapters beside each target module of one model. Not thread-safe: one forward at a time."""

    def __init__(self, model: PreTrainedModel, targets: Collection[str], count: int = 4, rank: int = 16) -> None:
        """Wrap the forward of each target module. Raises ValueError for a target that is no linear layer."""
        self.count, self.rank = count, rank
        self._device = model.device
        self._selection = _Selection()
        self._sites: dict[str, _Site] = {}
        modules = dict(model.named_modules())
        for path in targets:
            module = modules.get(path)
            if not _is_linear(module):
                allowed = target_modules(model)
                raise ValueError(f"{path!r} is no linear layer of {type(model).__name__}; allowed: {allowed}")
            self._sites[path] = _Site(module, count, rank, self._selection)

    @torch.no_grad()
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

    @contextmanager
    def chosen(self, slot_of_row: Sequence[int], width: int) -> Iterator[None]:
        """Within, each row of a forward uses its slot, BASE for none; `width` is the forward's tokens a row."""
        selection = self._selection
        slots = tuple(slot_of_row)
        if slots != selection.slots:
            selection.slots = slots
            selection.cached = [(slot, self._rows_of(slot, slots)) for slot in sorted(set(slots) - {BASE})]
        selection.parts, selection.width = selection.cached, width
        try:
            yield
        finally:
            selection.parts = []

    def remove(self) -> None:
        """Give the model its own forwards back."""
        for site in self._sites.values():
            site.remove()
        self._sites.clear()

    def _rows_of(self, slot: int, slots: tuple[int, ...]) -> Rows:
        rows = [i for i, s in enumerate(slots) if s == slot]
        if rows[-1] - rows[0] + 1 == len(rows):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self._device)

    def _check(self, path: str, a: Tensor, b: Tensor) -> None:
        site = self._sites.get(path)
        if site is None:
            raise ValueError(f"the adapter changes {path!r}, which has no slot; allowed: {sorted(self._sites)}")
        rank = a.shape[0]
        if tuple(a.shape) != (rank, site.inputs) or tuple(b.shape) != (site.outputs, rank):
            shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            expected = f"A ({rank}, {site.inputs}) and B ({site.outputs}, {rank})"
            raise ValueError(f"{path}: {shapes} do not fit; expected {expected}")
        if rank > self.rank:
            raise ValueError(f"{path}: rank {rank} is above the slots' rank; allowed: at most {self.rank}")


class _Selection:
    """Who uses which slot in the forward that runs: shared by all sites, so that choosing costs little."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, Rows]] = []
        """Each slot in use with its rows; empty while no forward of the engine runs."""
        self.width = 0
        self.slots: tuple[int, ...] = ()
        self.cached: list[tuple[int, Rows]] = []
        """The parts that belong to `slots`."""


class _Site:
    """One target module with its stacked adapters."""

    def __init__(self, module: nn.Linear | Conv1D, count: int, rank: int, selection: _Selection) -> None:
        if "forward" in vars(module):
            raise ValueError("this model already carries adapter slots; close their engine first")
        weight = module.weight
        self.outputs, self.inputs = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
        self._a = torch.zeros(count, rank, self.inputs, device=weight.device)
        self._b = torch.zeros(count, self.outputs, rank, device=weight.device)
        self._of_slot = [(a.T, b.T) for a, b in zip(self._a, self._b, strict=True)]
        self._module = module
        self._selection = selection
        vars(module)["forward"] = self._wrap(module.forward)  # found before the class's own

    def write(self, slot: int, a: Tensor, b: Tensor, scaling: float) -> None:
        self.clear(slot)
        rank = a.shape[0]
        self._a[slot, :rank].copy_(a)
        self._b[slot, :, :rank].copy_(b).mul_(scaling)

    def clear(self, slot: int) -> None:
        self._a[slot].zero_()
        self._b[slot].zero_()

    def remove(self) -> None:
        del vars(self._module)["forward"]

    def _wrap(self, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        selection = self._selection

        def forward(x: Tensor) -> Tensor:
            y = base_forward(x)
            if selection.parts:
                # some models flatten [B, T, in] to [B·T, in] on the way; rows that were picked out cannot be told apart
                rows, width = len(selection.slots), selection.width
                x_BTI, y_BTO = x.reshape(rows, width, self.inputs), y.view(rows, width, self.outputs)
                for slot, part in selection.parts:
                    _add(y_BTO, x_BTI, *self._of_slot[slot], part)
            return y

        return forward


def _add(y_BTO: Tensor, x_BTI: Tensor, a_IR: Tensor, b_RO: Tensor, rows: Rows) -> None:
    """y[rows] += (x[rows] · A) · B, in fp32 and in place."""
    low_NR = x_BTI[rows].flatten(0, 1).float() @ a_IR
    if isinstance(rows, slice) and y_BTO.dtype == torch.float32:
        y_BTO[rows].view(-1, y_BTO.shape[-1]).addmm_(low_NR, b_RO)
    else:
        part = (low_NR @ b_RO).to(y_BTO.dtype).view(-1, *y_BTO.shape[1:])
        if isinstance(rows, slice):
            y_BTO[rows] += part
        else:
            y_BTO.index_add_(0, rows, part)
