"""One forward over some of the running rows: logits of each last token.

By the native step, by the decoder, or by the Hugging Face model itself; on a GPU, decoding steps by their recordings.

Axes: B rows, T tokens a row (shorter ones padded on the left, so that the last token of every row is the last column; the
native step pads nothing), K positions seen, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from ctypes import CDLL

import torch
from torch import Tensor
from transformers import PreTrainedModel

from serving.decoder import Decoder, fits
from serving.graphs import Graphs, recorder
from serving.kv import KeyValueRows, given_cache, layer_shapes
from serving.lora import Slots
from serving.model import ModelError
from serving.native import Native
from serving.sites import BASE

_log = logging.getLogger(__name__)


class Forward:
    """The model with its key/value rows and adapter slots. One forward at a time."""

    def __init__(
        self, model: PreTrainedModel, slots: Slots, rows: int, max_len: int, library: CDLL | None = None
    ) -> None:
        """`library`: of the native step, where there is one.

        Raises ModelError for an architecture that cannot be served from rows.
        """
        self.model, self.slots = model, slots
        shapes = layer_shapes(model)
        self.kv = KeyValueRows(shapes, rows, max_len, model.dtype, model.device)
        windows = [s.window if s.window is not None and s.window < max_len else None for s in shapes]
        self._windows = dict(zip(_mask_names(model, windows), windows, strict=True))
        self._column_K = torch.arange(max_len, device=model.device)
        self._given_cache = given_cache(model, self.kv)
        self._native = Native(library, model, slots, self.kv, shapes) if library is not None else None
        decodes = self._native is None and fits(model, slots.targets)
        self._decoder = Decoder(model, slots, self.kv) if decodes else None
        record = recorder(model.device)
        self._graphs = Graphs(self._fixed, self.kv, record, model.device) if record is not None else None

    @property
    def way(self) -> str:
        """What computes it, in words."""
        if self._native is not None:
            return "the native step"
        way = "the decoder" if self._decoder is not None else "the model's own forward"
        return f"recordings of {way}" if self._graphs is not None else way

    @property
    def native(self) -> bool:
        """True when no token is padded, so that it makes no difference in how large pieces a prompt is read; and then
        torch's own threads are in the way."""
        return self._native is not None

    def close(self) -> None:
        """End the threads of its own."""
        if self._native is not None:
            self._native.close()

    def run(self, first: int, ids: Sequence[Sequence[int]], starts: Sequence[int], slots: Sequence[int]) -> Tensor:
        """Logits after the last id of each row; logits_BV.

        `ids`: the next ids of rows first, first+1, …; `starts`: how many positions each of these rows holds already;
        `slots`: the adapter slot of each.
        """
        if self._native is not None:
            return self._native(first, ids, starts, slots)
        if self._graphs is not None and first == 0 and all(len(row) == 1 for row in ids):
            return self._graphs([row[0] for row in ids], starts, slots)
        width = max(len(row) for row in ids)
        padding = [width - len(row) for row in ids]
        read = max(start + len(row) for start, row in zip(starts, ids, strict=True))
        device = self.model.device
        ids_BT = torch.tensor([[0] * pad + list(row) for pad, row in zip(padding, ids, strict=True)], device=device)
        offset_B1 = torch.tensor(starts, device=device)[:, None] - torch.tensor(padding, device=device)[:, None]
        column_T = self._column_K[:width]
        position_BT = column_T + offset_B1
        place_BT = position_BT
        if any(padding):
            is_padding_BT = column_T < torch.tensor(padding, device=device)[:, None]
            position_BT = position_BT.masked_fill(is_padding_BT, 0)
            place_BT = position_BT.masked_fill(is_padding_BT, self.kv.length)
        self.kv.aim(first, place_BT, read)
        with self.slots.chosen(slots, width):
            return self._compute(ids_BT, position_BT, read)

    def _fixed(self, given_4B: Tensor, read: int, adapters: bool) -> Tensor:
        """One token of each row, by operations on the device alone (serving/graphs.py)."""
        ids_B1, position_B1, place_B1, slot_B1 = given_4B[..., None]
        self.kv.aim(0, place_B1, read)
        with self.slots.chosen_on_device(slot_B1 if adapters else None):
            return self._compute(ids_B1, position_B1, read)

    def _compute(self, ids_BT: Tensor, position_BT: Tensor, read: int) -> Tensor:
        mask = self._mask(position_BT, read)
        if self._decoder is not None and isinstance(mask, Tensor):
            return self._decoder(ids_BT, position_BT, mask)
        output = self.model(
            input_ids=ids_BT,
            position_ids=position_BT,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **self._given_cache,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def probe(self, slot: int, ids: Sequence[int]) -> bool:
        """True when the logits after these ids are finite with this slot; no reply's row is touched."""
        spare = self.kv.rows
        try:
            return bool(torch.isfinite(self.run(spare, [ids], [0], [slot])).all())
        finally:
            self.kv.wipe(spare, len(ids))

    def check(self) -> None:
        """Compare the logits of a few ids, read piece by piece into rows, with those of a plain forward.

        Raises ModelError when they differ: some architectures look at masks or positions in ways of their own.
        """
        if self.kv.length < 4:
            self._graphs = None
            return  # too short to be read in pieces
        ids = [1 + i % 7 for i in range(min(12, self.kv.length))]
        cuts = [[0, len(ids) // 2, len(ids) - 1, len(ids)], [0, len(ids) // 3, len(ids) - 1, len(ids)]][: self.kv.rows]
        name = self.model.config.model_type
        try:
            self._record()
            plain = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[:, -1]
            for i in range(3):
                pieces = [ids[cut[i] : cut[i + 1]] for cut in cuts]
                logits_BV = self.run(0, pieces, [cut[i] for cut in cuts], [BASE] * len(cuts))
        except Exception as error:  # foreign code, of which only one thing matters: it does not run
            raise ModelError(f"a {name} model cannot be served: {type(error).__name__}: {error}") from error
        finally:
            for row in range(len(cuts)):
                self.kv.wipe(row, len(ids))
        difference = (logits_BV.float().log_softmax(-1) - plain.float().log_softmax(-1)).abs().max().item()
        if not difference < (1e-3 if self.model.dtype == torch.float32 else 0.5):
            raise ModelError(f"a {name} model cannot be served: read in pieces, its log-probs are {difference:.2g} off")

    def _record(self) -> None:
        """Record the decoding steps, where that can be done."""
        if self._graphs is not None:
            try:
                self._graphs.record()
            except RuntimeError as error:  # a forward that waits for the device, or there is no memory left
                self._graphs = None
                _log.warning("Decoding steps cannot be recorded, replies are slower than they could be: %s", error)

    def _mask(self, position_BT: Tensor, read: int) -> Tensor | dict[str, Tensor]:
        """What each token sees, as numbers to add to the attention scores [B, 1, T, K]; one for each kind of layer."""
        position_B1T1 = position_BT[:, None, :, None]
        column_K = self._column_K[:read]
        masks = {}
        for name, window in self._windows.items():
            seen = column_K <= position_B1T1
            if window is not None:
                seen &= column_K > position_B1T1 - window
            masks[name] = torch.zeros((), dtype=self.model.dtype, device=seen.device).where(seen, float("-inf"))
        return masks if len(masks) > 1 else next(iter(masks.values()))


def _mask_names(model: PreTrainedModel, windows: Sequence[int | None]) -> list[str]:
    """The name under which each layer of a mixed model looks up its mask; one for all where one mask serves all."""
    if len(set(windows)) == 1:
        return [""] * len(windows)
    names = list(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if set(names) != {"full_attention", "sliding_attention"} or len(set(windows)) != 2 or len(names) != len(windows):
        raise ModelError(
            f"{model.config.model_type} mixes attention layers of kinds {sorted(set(names))}; "
            "allowed: full_attention and sliding_attention with one window"
        )
    return names
