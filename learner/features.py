"""What the reward model sees of a reply: the words, counted, and what the base made of them after this prompt.

The words are a bag of token ids, each blurred over the tokens whose embeddings are like its own, so that one smiling face
says something of the next. Beside the bag: how long the reply is, how it begins and how it ends. How often a token occurs is
left out: a policy that may climb such a count says the same again and again ("-" on a line of its own, for who likes bullets).
All of that is additive over tokens, so a fitted utility is a table of token scores, and a half-said reply has one too. Only
the base's hidden states know the prompt; they count once the reply is whole.

Axes: B replies, T tokens of one reply, F features, U tokens of the dictionary, V vocabulary, H embedding width, S numbers of
a state, K members.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARPNESS = 5.0
"""How fast likeness falls with the cosine distance of two tokens' embeddings: e^(−5·distance)."""
SHARES: Mapping[str, float] = {"bag": 0.3, "length": 0.08, "first": 0.06, "last": 0.06, "state": 0.5}
"""How much of the prior belief each block of features gets; measured, see benchmarks/LOG.md."""
DICTIONARY = 4096
"""At most so many tokens, the most frequent ones of the judged replies."""
_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class Said:
    """The tokens of one reply with what each adds to the blocks: its end-of-sequence is not among them."""

    ids: list[int]
    new: list[float]
    """1 where the token was not said before."""

    @classmethod
    def of(cls, reply_ids: Sequence[int], eos_ids: Collection[int]) -> Said:
        ids = [token for token in reply_ids if token not in eos_ids]
        first = {token: place for place, token in reversed([*enumerate(ids)])}
        return cls(ids, [float(first[token] == place) for place, token in enumerate(ids)])


class Features:
    """The dictionary of a set of replies, and the features of any reply by it."""

    def __init__(
        self, embeddings_VH: Tensor, eos_ids: Collection[int], replies: Sequence[Sequence[int]], states_BS: Tensor
    ) -> None:
        """`embeddings_VH`: the base's input embeddings. `replies`: those that were judged; they set centre and scale.

        `states_BS`: what the base made of each of them; S may be 0.
        """
        centred_VH = embeddings_VH.detach().float() - embeddings_VH.detach().float().mean(0)
        self.directions_VH = centred_VH / centred_VH.norm(dim=1, keepdim=True).clamp_min(1e-6)
        self.eos_ids = frozenset(eos_ids)
        said = [Said.of(reply, self.eos_ids) for reply in replies]
        counts = Counter(token for reply in said for token in set(reply.ids))
        self.dictionary = sorted(token for token, _ in counts.most_common(DICTIONARY))
        self.spread_S = (states_BS - states_BS.mean(0)).square().mean(0).sqrt().clamp_min(1e-6)
        blocks = self._blocks(said, states_BS)
        total = sum(SHARES[name] for name, block in blocks.items() if block.shape[1])
        self.centre = {name: block.mean(0) for name, block in blocks.items()}
        self.scale = {
            name: math.sqrt(SHARES[name] / total / max(float((block - self.centre[name]).square().sum(1).mean()), 1e-6))
            for name, block in blocks.items()
        }

    def of(self, replies: Sequence[Sequence[int]], states_BS: Tensor) -> Tensor:
        """[B, F], centred; over the judged replies the squared norm of a row is 1 in the mean."""
        blocks = self._blocks([Said.of(reply, self.eos_ids) for reply in replies], states_BS)
        return torch.cat([(block - self.centre[name]) * self.scale[name] for name, block in blocks.items()], 1)

    def tables(self, weights_KF: Tensor) -> Tables:
        """The same utilities, r = w·features + constant, as scores of tokens and of states."""
        sizes = [len(self.centre[name]) for name in SHARES]
        parts = dict(zip(SHARES, weights_KF.split(sizes, 1), strict=True))
        middling = {name: part @ (self.centre[name] * self.scale[name]) for name, part in parts.items()}
        state_offset_K = middling.pop("state")
        constant_K = -torch.stack([*middling.values()]).sum(0)
        blurred = {name: self._blur(parts[name] * self.scale[name]) for name in ("bag", "first", "last")}
        length_K = parts["length"].squeeze(1) * self.scale["length"]
        return Tables(
            bag_KV=blurred["bag"],
            first_KV=blurred["first"],
            last_KV=blurred["last"],
            length_K=length_K,
            constant_K=constant_K,
            end_K=middling["last"],
            state_KS=parts["state"] * self.scale["state"] / self.spread_S,
            state_offset_K=state_offset_K,
            eos_ids=self.eos_ids,
        )

    def _blocks(self, said: Sequence[Said], states_BS: Tensor) -> dict[str, Tensor]:
        """Features before centring and scaling, in the order of SHARES, each [B, U] but length [B, 1] and state [B, S]."""
        vocabulary = sorted({token for reply in said for token in reply.ids})
        column = {token: index for index, token in enumerate(vocabulary)}
        likeness_XU = self._likeness(vocabulary)
        bag, first, last = (torch.zeros(len(said), len(self.dictionary)) for _ in range(3))
        for row, reply in enumerate(said):
            if not reply.ids:
                continue
            columns = [column[token] for token in reply.ids]
            bag[row] = torch.tensor(reply.new) @ likeness_XU[columns]
            first[row], last[row] = likeness_XU[columns[0]], likeness_XU[columns[-1]]
        length_B1 = torch.tensor([[float(len(reply.ids))] for reply in said])
        state_BS = states_BS / self.spread_S
        return {"bag": bag, "length": length_B1, "first": first, "last": last, "state": state_BS}

    def _likeness(self, tokens: Sequence[int]) -> Tensor:
        """How much each token counts as each of the dictionary, [X, U], 1 for itself."""
        cosine_XU = self.directions_VH[list(tokens)] @ self.directions_VH[self.dictionary].T
        return torch.exp(SHARPNESS * (cosine_XU - 1))

    def _blur(self, weights_KU: Tensor) -> Tensor:
        """Scores of the dictionary's tokens spread over the whole vocabulary, [K, V]."""
        chunks = torch.arange(len(self.directions_VH)).split(_CHUNK)
        return torch.cat([weights_KU @ self._likeness(chunk.tolist()).T for chunk in chunks], 1)


@dataclass(frozen=True, slots=True)
class Tables:
    """K utilities as scores of tokens and of states."""

    bag_KV: Tensor
    first_KV: Tensor
    last_KV: Tensor
    length_K: Tensor
    constant_K: Tensor
    end_K: Tensor
    """What the end of a reply adds in the mean over the judged replies."""
    state_KS: Tensor
    state_offset_K: Tensor
    """What the states add in the mean over the judged replies."""
    eos_ids: frozenset[int]

    def rescaled(self, shift_K: Tensor, scale_K: Tensor) -> Tables:
        """(utility − shift) ÷ scale."""
        tables = {name: getattr(self, name) for name in self.__slots__ if name.endswith(("KV", "KS"))}
        numbers = {name: getattr(self, name) for name in self.__slots__ if name.endswith("_K")}
        numbers["constant_K"] = numbers["constant_K"] - shift_K
        return Tables(
            **{name: table / scale_K[:, None] for name, table in tables.items()},
            **{name: number_K / scale_K for name, number_K in numbers.items()},
            eos_ids=self.eos_ids,
        )

    def running(self, reply_ids: Sequence[int], state_S: Tensor) -> Tensor:
        """The utility of the reply said so far, before its first token and after each, [K, T+1]; the last is the whole reply's.

        How a reply ends, and its state, count once it has ended: until then they are taken to be middling.
        """
        said = Said.of(reply_ids, self.eos_ids)
        running_KT = self.constant_K[:, None].repeat(1, len(reply_ids) + 1)
        if said.ids:
            ids = torch.tensor(said.ids)
            added_KT = self.bag_KV[:, ids] * torch.tensor(said.new)
            added_KT += self.length_K[:, None]
            added_KT[:, 0] += self.first_KV[:, ids[0]]
            running_KT[:, 1 : len(ids) + 1] += added_KT.cumsum(1)
            running_KT[:, len(ids) + 1 :] = running_KT[:, len(ids), None]
            running_KT[:, :-1] += self.end_K[:, None]
            running_KT[:, -1] += self.last_KV[:, ids[-1]]
        running_KT[:, -1] += self.state_KS @ state_S - self.state_offset_K
        return running_KT

    def utilities(self, replies: Sequence[Sequence[int]], states_BS: Tensor) -> Tensor:
        """The utility of whole replies, [K, B]."""
        pairs = zip(replies, states_BS, strict=True)
        return torch.stack([self.running(reply, state_S)[:, -1] for reply, state_S in pairs], 1)
