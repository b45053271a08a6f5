"""Replies side by side, as HTML: what the version served now said, and what its candidate says, shaded token by token."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from learner.exhibits import Alike, Pair, Piece, Reply

STRONG_KL, STRONG_WORTH = 2.0, 0.3
"""Nats of a token, and standard deviations of the score, from which on its shade grows no deeper."""

NOTE = (
    "Drawn at random, not the best. Good: you would rather have had the second reply, and the shade is thin. Bad: what was right "
    "is wrong now, or the same few deeply shaded words stand in every reply: it found a trick."
)
LEGEND = (
    '<p class="legend faint"><b style="--k:.15">a little</b><b style="--k:.5">more</b><b style="--k:1">much</b> unlike what '
    f"the base would say here (KL; the deepest shade is {STRONG_KL:g} nats and more) · "
    '<b class="up" style="--w:1">raised</b> <b class="down" style="--w:1">lowered</b> the score. '
    "■ is the end, which also bears what only the whole reply tells. The pointer over a word shows its numbers.</p>"
)


def side_by_side(pairs: Sequence[Pair], before: str) -> str:
    """All of them; `before`: what the version served now is called."""
    return LEGEND + "".join(_pair(pair, before) for pair in pairs)


def _pair(pair: Pair, before: str) -> str:
    replies = _reply(pair.before, before) + _reply(pair.after, "the candidate")
    return (
        f'<div class="pair"><div class="asked">{escape(pair.prompt)}</div><div class="grid2">{replies}</div>'
        f"<details><summary>Rated replies most like the candidate’s</summary>{''.join(map(_alike, pair.alike))}</details></div>"
    )


def _reply(reply: Reply, who: str) -> str:
    told = "".join(map(_piece, reply.pieces))
    head = f"{who}: score {reply.score:+.2f}, {reply.kl:.2f} nats from the base".replace("-", "−")
    return f'<div><span class="faint">{head}</span><div class="said">{told}</div></div>'


def _piece(piece: Piece) -> str:
    way = "up" if piece.worth >= 0 else "down"
    shades = f"--k:{_shade(piece.kl, STRONG_KL)};--w:{_shade(abs(piece.worth), STRONG_WORTH)}"
    numbers = f"KL {piece.kl:.2f} nats, score {piece.worth:+.2f}"
    return f'<b class="{way}" style="{shades}" title="{numbers}">{escape(piece.text)}</b>'


def _alike(one: Alike) -> str:
    head = f"{escape(one.said)} · asked: {escape(one.prompt)}"
    return f'<blockquote><span class="faint">{head}</span>\n{escape(one.text)}</blockquote>'


def _shade(value: float, strong: float) -> str:
    return f"{min(max(value / strong, 0.0), 1.0):.2f}"
