"""From logits to tokens: temperature, top-p, top-k, min-p, seeds, and the log-probs of what was drawn.

Every row draws by one number u in [0, 1) that depends on its seed and its place in the reply alone, and takes the first
token at which the cumulative distribution passes u. So a reply with a seed does not depend on who else is in the batch,
and rows with and without a seed go through the same few tensor operations.

Axes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOP_LOGPROBS = 20
_BLOCK = 32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one reply is sampled. The defaults are the model's own distribution."""

    temperature: float = 1.0
    """0 (anything below a millionth) takes the likeliest token; 1 samples as the model says."""
    top_p: float = 1.0
    """In (0, 1]: only the likeliest tokens that together reach this probability."""
    top_k: int = 0
    """Only this many likeliest tokens; 0 for all."""
    min_p: float = 0.0
    """In [0, 1]: only tokens at least this share as likely as the likeliest."""
    bias: tuple[tuple[int, float], ...] = ()
    """Token ids with what is added to their logits before anything else, -100 to 100."""
    max_tokens: int = 256
    """At most this many sampled tokens, and never more than the model's length allows."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these texts."""
    seed: int | None = None
    """Same seed, version and prompt: same reply, whatever else is in the batch."""
    top_logprobs: int = 0
    """How many likeliest tokens to report with each sampled one, 0 to 20."""
    ignore_eos: bool = False
    """Go on to `max_tokens` whatever the model says (benchmarks)."""

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, self.temperature >= 0, "a number from 0")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or a positive whole number")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("bias", self.bias, all(i >= 0 and abs(b) <= 100 for i, b in self.bias), "token ids with -100 to 100")
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "a positive whole number")
        _check("stop", self.stop, all(self.stop), "texts that are not empty")
        _check("top_logprobs", self.top_logprobs, 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, "0 to 20")

    @property
    def full_support(self) -> bool:
        """True when every token of the vocabulary can be drawn, and none was favoured by name."""
        return not self.greedy and not self.restricted and not self.bias

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6

    @property
    def restricted(self) -> bool:
        """True when top-p, top-k or min-p may cut tokens off."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


def _check(name: str, value: object, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


class RowSampling:
    """The sampling of the rows of one batch, as tensors: built when rows join or leave, used at each step between."""

    def __init__(self, rows: Sequence[Sampling], seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        """`seeds`: one 64-bit number a row, drawn by the caller for rows without a seed of their own."""
        self.device = torch.device(device)
        self.seed_B = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64, device=device)
        self.plain = all(row.temperature == 1 and not row.restricted and not row.bias for row in rows)
        """True when every row draws from the model's own distribution: raw and processed log-probs are the same."""
        self.likeliest = all(row.greedy and not row.bias for row in rows)
        """True when every row takes the likeliest token."""
        self.greedy_B = torch.tensor([row.greedy for row in rows], device=device)
        self.temperature_B1 = torch.tensor([[1.0 if row.greedy else row.temperature] for row in rows], device=device)
        restricted = [i for i, row in enumerate(rows) if row.restricted and not row.greedy]
        self.restricted_R = torch.tensor(restricted, dtype=torch.int64, device=device)
        self.top_p_R1 = torch.tensor([[rows[i].top_p] for i in restricted], device=device)
        self.top_k_R1 = torch.tensor([[rows[i].top_k or 2**31] for i in restricted], device=device)
        self.min_p_R1 = torch.tensor([[rows[i].min_p] for i in restricted], device=device)
        self.biased_R = torch.tensor([i for i, row in enumerate(rows) if row.bias], dtype=torch.int64, device=device)
        biases = [(i, token, value) for i, row in enumerate(rows) for token, value in row.bias]
        self.bias_row_N, self.bias_id_N = (torch.tensor([bias[k] for bias in biases], device=device) for k in (0, 1))
        self.bias_N = torch.tensor([bias[2] for bias in biases], dtype=torch.float32, device=device)
        self.top = max((row.top_logprobs for row in rows), default=0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was drawn in one step. A row whose logits were not finite has a NaN in `raw_logprobs`."""

    ids: list[int]
    logprobs: list[float]
    """Under the distribution each token was drawn from; 0.0 where the likeliest was taken."""
    raw_logprobs: list[float]
    """At temperature 1 under the full softmax."""
    top: list[list[tuple[int, float]]] | None
    """Likeliest tokens with their raw log-probs, as many as the most demanding row asked; None when none asked."""


def sample(logits_BV: Tensor, rows: RowSampling, steps: Sequence[int]) -> Sampled:
    """Draw one token a row. `steps`: the tokens each row's reply has already; with its seed they decide the draw."""
    if rows.likeliest and not rows.top:
        ids_B = logits_BV.argmax(dim=-1)
        raw_B = torch.log_softmax(logits_BV.float(), dim=-1).gather(1, ids_B[:, None])[:, 0]
        return _sampled(ids_B, raw_B, torch.zeros_like(raw_B), None)
    u_B = uniform(rows.seed_B, torch.tensor(steps, dtype=torch.int64, device=rows.device))
    if rows.plain and not rows.top:
        probs_BV = torch.softmax(logits_BV.float(), dim=-1)
        ids_B = _draw(probs_BV, u_B)
        raw_B = processed_B = probs_BV.gather(1, ids_B[:, None])[:, 0].log()
        top = None
    else:
        raw_BV = biased_BV = torch.log_softmax(logits_BV.float(), dim=-1)
        if rows.biased_R.numel():
            logits_BV, biased_BV = _add_bias(logits_BV.float(), raw_BV, rows)
        processed_BV = _process(biased_BV, rows)
        ids_B = torch.where(rows.greedy_B, logits_BV.argmax(dim=-1), _draw(processed_BV.exp(), u_B))
        raw_B = raw_BV.gather(1, ids_B[:, None])[:, 0]
        processed_B = processed_BV.gather(1, ids_B[:, None])[:, 0].masked_fill(rows.greedy_B, 0.0)
        top = _likeliest(raw_BV, rows.top)
    return _sampled(ids_B, raw_B, processed_B, top)


def _sampled(ids_B: Tensor, raw_B: Tensor, processed_B: Tensor, top: list[list[tuple[int, float]]] | None) -> Sampled:
    """As numbers of Python's: all of them in one copy from the device."""
    ids, raw, processed = torch.stack((ids_B.double(), raw_B.double(), processed_B.double())).tolist()
    return Sampled([int(i) for i in ids], processed, raw, top)


def uniform(seed_B: Tensor, step_B: Tensor) -> Tensor:
    """A number in [0, 1) for each (seed, step), as float64: two rounds of splitmix64 (Steele et al. 2014)."""
    mixed_B = _splitmix(_splitmix(seed_B) + step_B)
    # the top 48 bits: few enough that u·total never rounds up to total in float64
    return ((mixed_B >> 16) & (2**48 - 1)).double() * 2.0**-48


def _draw(probs_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token at which each row's cumulative distribution passes u; ids_B, int64.

    Found block by block: the sums of the blocks are many times fewer than the tokens to add up one after another.
    """
    rows, width = probs_BV.shape
    if width % _BLOCK:
        probs_BV = torch.nn.functional.pad(probs_BV, (0, -width % _BLOCK))
    probs_BNK = probs_BV.view(rows, -1, _BLOCK)
    block_BN = probs_BNK.sum(dim=-1).double()
    upto_BN = block_BN.cumsum(dim=-1)
    target_B1 = u_B[:, None] * upto_BN[:, -1:]
    n_B1 = _first_above(upto_BN, target_B1)
    within_BK = probs_BNK[torch.arange(rows, device=u_B.device), n_B1[:, 0]].double().cumsum(dim=-1)
    left_B1 = (target_B1 - (upto_BN.gather(1, n_B1) - block_BN.gather(1, n_B1))).clamp_min(0)
    left_B1 = torch.minimum(left_B1, within_BK[:, -1:] * (1 - 2.0**-48))  # the block's sum is rounded otherwise
    ids_B = (n_B1 * _BLOCK + _first_above(within_BK, left_B1))[:, 0]
    return ids_B.clamp_(max=width - 1)


def _first_above(rising_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first place above the target; the last place where there is none, as in rows of NaN."""
    return torch.searchsorted(rising_BN, target_B1, right=True).clamp_(max=rising_BN.shape[1] - 1)


def _add_bias(logits_BV: Tensor, raw_BV: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Logits and log-probs after the rows' biases; rows without one stay as they are, to the last bit."""
    biased_BV = logits_BV.index_put((rows.bias_row_N, rows.bias_id_N), rows.bias_N, accumulate=True)
    logprobs_BV = raw_BV.clone()
    logprobs_BV[rows.biased_R] = torch.log_softmax(biased_BV[rows.biased_R], dim=-1)
    return biased_BV, logprobs_BV


def _process(raw_BV: Tensor, rows: RowSampling) -> Tensor:
    """Log-probs after temperature and the cuts; greedy rows are processed as at temperature 1 and not used."""
    below_best_BV = raw_BV - raw_BV.amax(dim=-1, keepdim=True)  # so that a tiny temperature leaves the best at 0
    scaled_BV = torch.log_softmax(below_best_BV / rows.temperature_B1, dim=-1)
    scaled_BV = raw_BV.where(rows.temperature_B1 == 1, scaled_BV)  # to the last bit, whoever else is in the batch
    if rows.restricted_R.numel():
        cut_RV = _cut(scaled_BV[rows.restricted_R], rows)
        scaled_BV[rows.restricted_R] = torch.log_softmax(cut_RV, dim=-1)
    return scaled_BV


def _cut(logprobs_RV: Tensor, rows: RowSampling) -> Tensor:
    """-inf for what top-k, top-p and min-p leave out of the distribution after temperature; the likeliest stays."""
    sorted_RV, order_RV = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    before_RV = sorted_RV.exp().cumsum(dim=-1, dtype=torch.float64) - sorted_RV.exp()
    rank_V = torch.arange(sorted_RV.shape[1], device=sorted_RV.device)
    out_RV = (rank_V >= rows.top_k_R1) | (before_RV >= rows.top_p_R1)
    out_RV |= sorted_RV < sorted_RV[:, :1] + rows.min_p_R1.log()
    out_RV[:, 0] = False
    return logprobs_RV.masked_fill(torch.zeros_like(out_RV).scatter(1, order_RV, out_RV), float("-inf"))


def _likeliest(raw_BV: Tensor, count: int) -> list[list[tuple[int, float]]] | None:
    if count == 0:
        return None
    values_BK, ids_BK = raw_BV.topk(min(count, raw_BV.shape[1]), dim=-1)
    return [
        list(zip(ids, values, strict=True)) for ids, values in zip(ids_BK.tolist(), values_BK.tolist(), strict=True)
    ]


def _splitmix(x_B: Tensor) -> Tensor:
    """splitmix64's next state and output, in wrapping int64 (shifts made logical by masks)."""
    x_B = x_B + _signed(0x9E3779B97F4A7C15)
    x_B = (x_B ^ ((x_B >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    x_B = (x_B ^ ((x_B >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return x_B ^ ((x_B >> 31) & (2**33 - 1))


def _signed(x: int) -> int:
    """The int64 with the same 64 bits (whatever the size of x, so that any seed will do)."""
    x &= 2**64 - 1
    return x - 2**64 if x >= 2**63 else x
