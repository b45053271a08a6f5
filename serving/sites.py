"""Linear layers that read the same input, with the stacked adapters beside them; and which row of a forward uses which.

Axes: as in serving/lora.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from serving.products import Product, out_in

BASE = -1
"""The slot index of rows that use no adapter."""
_NOTHING = torch.empty(0)


class Selection:
    """Who uses which slot in the forward that runs: shared by all sites, so that choosing costs little."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.running = False
        """True while a forward of the engine runs."""
        self.forwards = 0
        self.live: tuple[int, int] | None = None
        """The slots in use lie from the first of these to before the second; None when no row uses one."""
        self.others_NS1: Tensor | None = None
        """True where a token does not use a slot of these; None when all use the one."""
        self.tokens = 0
        self._slots: tuple[int, ...] = ()
        self._width = 0
        self._index_S = torch.arange(count, device=device)

    def choose(self, slots: tuple[int, ...], width: int) -> None:
        if slots == self._slots and width == self._width:
            return
        self._slots, self._width, self.tokens = slots, width, len(slots) * width
        used = set(slots) - {BASE}
        self.live, self.others_NS1 = None, None
        if used:
            self.live = first, end = min(used), max(used) + 1
            if len(used) > 1 or BASE in slots:
                slot_N1 = torch.tensor(slots, device=self._index_S.device).repeat_interleave(width)[:, None]
                self.others_NS1 = (slot_N1 != self._index_S[first:end])[:, :, None]

    def choose_any(self, slot_N1: Tensor | None) -> None:
        self._slots = ()  # so that the next choice is made anew
        self.live, self.others_NS1 = None, None
        if slot_N1 is not None:
            self.live, self.tokens = (0, len(self._index_S)), len(slot_N1)
            self.others_NS1 = (slot_N1 != self._index_S)[:, :, None]


class Site:
    """Target modules that read the same input, with their stacked adapters."""

    def __init__(
        self, modules: Sequence[nn.Linear | Conv1D], count: int, rank: int, selection: Selection, *, packed: bool
    ) -> None:
        if any("forward" in vars(module) for module in modules):
            raise ValueError("this model already carries adapter slots; close their engine first")
        weights = [out_in(module) for module in modules]
        self.inputs, self.outputs = weights[0].shape[1], [weight.shape[0] for weight in weights]
        # on a processor, products this small are fastest in fp32, and exact as well
        self.dtype = torch.float32 if weights[0].device.type == "cpu" else weights[0].dtype
        ends = [sum(self.outputs[: i + 1]) for i in range(len(modules))]
        self._cuts = [slice(end - size, end) for end, size in zip(ends, self.outputs, strict=True)]
        self._rank, self._selection, self._modules = rank, selection, list(modules)
        own_forwards = [module.forward for module in modules]
        self._base: Callable[[Tensor], Tensor] = Product(modules) if packed else _side_by_side(own_forwards)
        # R: the ranks of one module after another; B is zero where the rank of one meets the output of another
        ranks, device = len(modules) * rank, weights[0].device
        self.a_SRI = torch.zeros(count, ranks, self.inputs, dtype=self.dtype, device=device)
        self.b_SRO = torch.zeros(count, ranks, ends[-1], dtype=self.dtype, device=device)
        self._flat: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._x: Tensor | None = None
        """What was read last, until each module has had its part of the result; in which forward that was."""
        self._when = 0
        self._y = _NOTHING
        for member, module in enumerate(modules):
            vars(module)["forward"] = self._wrap(member, module.forward)  # found before the class's own

    @property
    def copied_bytes(self) -> int:
        return self._base.copied_bytes if isinstance(self._base, Product) else 0

    def write(self, slot: int, member: int, a_RI: Tensor, b_OR: Tensor) -> None:
        ranks = slice(member * self._rank, member * self._rank + a_RI.shape[0])
        for there, new in ((self.a_SRI[slot, ranks], a_RI), (self.b_SRO[slot, ranks, self._cuts[member]], b_OR.T)):
            if there.is_cuda and not new.is_cuda:
                new = new.contiguous().pin_memory()
            there.copy_(new, non_blocking=True)

    def clear(self, slot: int, member: int) -> None:
        ranks = slice(member * self._rank, (member + 1) * self._rank)
        self.a_SRI[slot, ranks] = 0
        self.b_SRO[slot, ranks] = 0

    def remove(self) -> None:
        for module in self._modules:
            del vars(module)["forward"]

    def _wrap(self, member: int, own_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        selection, last, cut = self._selection, len(self._modules) - 1, self._cuts[member]

        def forward(x: Tensor) -> Tensor:
            if not selection.running:
                return own_forward(x)
            if last == 0:
                return self.product(x)
            if x is not self._x or self._when != selection.forwards:
                self._x, self._y, self._when = x, self.product(x), selection.forwards
            y = self._y[..., cut]
            if member == last:
                self._x, self._y = None, _NOTHING
            return y

        return forward

    def product(self, x: Tensor) -> Tensor:
        """W·x + B·A·x of all modules, one after another in the last axis."""
        y, selection = self._base(x), self._selection
        if selection.live is not None and self._rank:
            # some models flatten [B, T, in] to [B·T, in] on the way: either way the tokens of a row lie together
            x_NI, y_NO = x.reshape(-1, self.inputs), y.view(-1, y.shape[-1])
            a_RI, b_RO = self._of(selection.live)
            low_NR = linear(x_NI.to(self.dtype), a_RI)
            if selection.others_NS1 is not None:
                low_NR.view(selection.tokens, -1, self.b_SRO.shape[1]).masked_fill_(selection.others_NS1, 0)
            if y.dtype == self.dtype:
                y_NO.addmm_(low_NR, b_RO)
            else:
                y_NO.add_(low_NR @ b_RO)
        return y

    def _of(self, live: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A and B of these slots, as one product each."""
        if live not in self._flat:
            first, end = live
            self._flat[live] = (
                self.a_SRI[first:end].view(-1, self.inputs),
                self.b_SRO[first:end].view(-1, sum(self.outputs)),
            )
        return self._flat[live]


def _side_by_side(forwards: Sequence[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    if len(forwards) == 1:
        return forwards[0]
    return lambda x: torch.cat([forward(x) for forward in forwards], -1)
