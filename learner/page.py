"""An update as a page: one HTML file for an operator who is no ML engineer, without JavaScript, by day and by night.

Prompts and replies are strangers' text: everything that is not ours goes through `escape`, and the page's own policy forbids it
to load or run anything. It is written for its owner's eyes alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from learner import drawing, replies
from learner.exhibits import Exhibits
from learner.ledger import Update
from serving.durable import replace

KEPT = 20
"""Pages of refused updates that are kept, the newest."""
CHECKS = "May anyone be served this? Only if every check passes; “skipped” was not reached, and passes nothing."
SOURCES = "Good: hundreds of judgements, by many people. Bad: few, or all by one: it learns their slips too."
REWARD = "A model of what people like, fitted to their judgements. The training follows it, so it is worth no more than this is."
REWARD_FIGURES = (
    (
        "auroc",
        "{:.0%}",
        "ordered rightly",
        "of pairs of judgements it never saw. Good: 70% and more. Bad: near 50%, chance.",
    ),
    ("nll", "{:.3f}", "surprise", "nats that a judgement it never saw costs it. Good: clearly below the next line."),
    ("chance_nll", "{:.3f}", "surprise, guessing", "what it costs who knows only how often each judgement is given."),
    ("calibration_error", "{:.1%}", "off by", "its foretold chance of a thumb up. Good: below 5%. Bad: above 15%."),
    (
        "length_correlation",
        "{:+.2f}",
        "likes length",
        "from −1 (short) to +1 (long). Good: near 0, unless people ask for shorter or longer replies.",
    ),
    ("agreement", "{:.2f}", "agrees with itself", "its five members. Good: above 0.8. Bad: below 0.5: they guess."),
)
CALIBRATION = (
    "Across: the chance of a thumb up that it foretold. Upwards: the share there was, of judgements it never saw; a larger "
    "circle is more of them. Good: circles along the dashed line, from corner to corner. Bad: all in one spot, or far off."
)
HISTOGRAM = (
    "Across: what the model of people’s taste makes of a reply; it ends where a thumb up is certain. Upwards: the share of "
    "replies. Good: the candidate’s lie further to the right. Bad: they lie where the base’s do: nothing was won."
)
WINS = (
    "A second judge, who knows half of the judgements, prefers the candidate’s reply to that of the version it would replace at "
    "{} of the prompts (at least {}). Good: well above 50%. Bad: 50% and less. It proves little: the training knew that half too."
)
BATCH_FIGURES = (
    ("score", "Score", "Good: it rises. Bad: it falls, or jumps about."),
    (
        "kl",
        "Distance from the base, nats a reply",
        "Good: it levels off near the dashed line, the gate’s. Bad: it races on.",
    ),
    ("loss", "Loss", "Good: small and restless; it need not fall. Bad: it grows and grows."),
    ("clipped", "Share of tokens clipped", "Good: below 0.2. Bad: above: the steps are too long (HEED_LEARNING_RATE)."),
    ("explained_variance", "Forecast", "1: each reply’s score is foreseen. 0: not at all. Bad: below 0 all the time."),
)
TIMES = (
    "In seconds. Good: most of it is ppo and rollouts. Where all of it grew, something else is busy on the same cores."
)

Json = Mapping[str, Any]

_CSS = Path(__file__).with_name("page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def keep_page(folder: Path, number: int, page: str) -> Path:
    """Write the page of an update that made no version, and let the oldest ones go; returns where it lies. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    place = folder / f"update-{number:06d}.html"
    replace(place, page.encode(), mode=0o600)
    for old in sorted(folder.glob("update-*.html"))[:-KEPT]:
        old.unlink()
    return place


def update_page(update: Update, version: int | None, report: Json, gate: Json, exhibits: Exhibits, now: float) -> str:
    """The page of an update that reached the gate. `version`: what it made, if it passed; `now`: seconds since the epoch."""
    sections = (
        _checks(gate),
        _sources(update, report),
        _reward_model(report.get("reward")),
        _scores(exhibits, report.get("score") or {}),
        _training(report.get("policy"), gate),
        _times(report.get("seconds") or {}),
        _samples(exhibits, _name(update.parent)),
    )
    title = f"Update {update.number}"
    made = f"made {_name(version)} from {_name(update.parent)}" if version else f"was to replace {_name(update.parent)}"
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="robots" content="noindex">'
        f"<style>{_CSS.read_text('utf-8')}</style></head><body>"
        f'<h1>{title}</h1><p class="faint">{made} · {when} · it may hold people’s own words: share it with care</p>'
        f"{_verdict(gate)}{_tiles(update, report, gate)}{''.join(filter(None, sections))}</body></html>\n"
    )


def _name(version: int) -> str:
    return f"v{version}" if version else "the base (v0)"


def _verdict(gate: Json) -> str:
    if gate.get("passed"):
        return '<div class="verdict"><p><strong>The gate said yes.</strong> Every check below passed.</p></div>'
    said = "".join(f"<p>{escape(check['sentence'])}</p>" for check in gate["checks"] if check["verdict"] == "fail")
    return f'<div class="verdict fail"><p><strong>The gate said no.</strong> Nobody is served this candidate.</p>{said}</div>'


def _tiles(update: Update, report: Json, gate: Json) -> str:
    """The five numbers to look at first."""
    reward, score = report.get("reward") or {}, report.get("score") or {}
    bound = _check(gate, "kl").get("bound")
    tiles = [
        ("Learned from", str(update.feedback), "judgements of people"),
        ("Unseen judgements foretold", _shown(reward.get("auroc"), "{:.0%}"), "50% is a coin’s, 100% never wrong"),
        ("Score of its replies", _shown(score.get("candidate"), "{:+.2f}"), "the base’s replies: 0, spread 1"),
        (
            "Distance from the base",
            _shown((report.get("kl") or {}).get("reference"), "{:.2f}"),
            f"nats a reply; at most {_shown(bound, '{:.2f}')} pass",
        ),
        ("It took", f"{sum((report.get('seconds') or {}).values()):.0f} s", "of computing"),
    ]
    told = (f'<div><dt>{name}</dt><dd>{value}</dd><dd class="faint">{note}</dd></div>' for name, value, note in tiles)
    return f'<dl class="tiles">{"".join(told)}</dl>'


def _checks(gate: Json) -> str:
    rows = (
        f'<tr><td><span class="mark {check["verdict"]}">{check["verdict"]}</span></td>'
        f"<th>{escape(check['name'].replace('_', ' '))}</th><td>{escape(check['sentence'])}</td></tr>"
        for check in gate["checks"]
    )
    return _section("The gate", CHECKS, _table(rows))


def _sources(update: Update, report: Json) -> str:
    reward = report.get("reward") or {}
    kinds = [f"{count} {kind}{'s' * (count != 1)}" for kind, count in (reward.get("judgements") or {}).items()]
    told = [
        ("Judgements", ", ".join(kinds) or str(update.feedback)),
        ("People known by name", _shown(reward.get("raters"), "{}")),
        ("Read up to", ", ".join(f"{topic} {offset}" for topic, offset in update.offsets.items())),
    ]
    rows = (f"<tr><th>{name}</th><td>{escape(value)}</td></tr>" for name, value in told)
    return _section("What it learned from", SOURCES, _table(rows))


def _reward_model(reward: Json | None) -> str:
    if not reward:
        return ""
    rows = (
        f'<tr><th>{name}</th><td class="n">{_shown(reward.get(key), form)}</td><td class="faint">{note}</td></tr>'
        for key, form, name, note in REWARD_FIGURES
    )
    body = f"<div>{_table(rows)}</div>"
    if reward.get("calibration"):
        plot = drawing.calibration(reward["calibration"], "foretold against seen share of thumbs up")
        body += _figure(plot, CALIBRATION)
    return _section("What it took people to like", REWARD, f'<div class="grid2">{body}</div>')


def _scores(exhibits: Exhibits, score: Json) -> str:
    if not exhibits.base_scores:
        return ""
    groups = {"the base": exhibits.base_scores, "the candidate": exhibits.candidate_scores}
    keys = "".join(f'<span class="key {letter}">{name}</span>' for letter, name in zip("ab", groups, strict=True))
    body = f'<p class="faint">{keys}</p>{_figure(drawing.histogram(groups, "scores of replies"), HISTOGRAM)}'
    if score.get("win_rate") is not None:
        body += (
            f"<p>{WINS.format(_shown(score['win_rate'], '{:.0%}'), _shown(score.get('win_rate_lower'), '{:.0%}'))}</p>"
        )
    count = len(exhibits.base_scores)
    return _section("Replies by score", f"{count} fresh replies of each, to the same prompts.", body)


def _training(policy: Json | None, gate: Json) -> str:
    batches: Sequence[Json] = (policy or {}).get("batches") or ()
    if not policy or not batches:
        return ""
    bounds = {"kl": _check(gate, "kl").get("bound")}
    figures = []
    for key, name, note in BATCH_FIGURES:
        values = [batch.get(key) for batch in batches]
        plot = drawing.line(values, name, bound=bounds.get(key), marked=policy["kept"])
        figures.append(f"<div><h3>{name}</h3>{_figure(plot, note)}</div>")
    note = (
        f"Batch by batch. Start: {policy['started_from']}. End: {policy['stopped']}. "
        f"The dot is batch {policy['kept'] + 1}, which was taken"
    )
    note += f", scaled down to {policy['share']:.0%} so as to be within the limit." if policy["share"] < 1 else "."
    return _section("The training", escape(note), f'<div class="grid2">{"".join(figures)}</div>')


def _times(seconds: Json) -> str:
    if not any(seconds.values()):
        return ""
    parts = [*enumerate(seconds.items())]
    bar = "".join(f'<i class="p{place % 4}" style="flex:{took:.3f}"></i>' for place, (_, took) in parts)
    keys = (f'<span class="key p{place % 4}">{escape(name)} {took:.1f} s</span>' for place, (name, took) in parts)
    body = f'<div class="bar">{bar}</div><p class="faint">{"".join(keys)}</p>'
    return _section("Where the time went", TIMES, body)


def _samples(exhibits: Exhibits, before: str) -> str:
    if not exhibits.pairs:
        return ""
    body = replies.side_by_side(exhibits.pairs, before)
    return _section("The same prompts, before and after", replies.NOTE, body)


def _table(rows: Iterable[str]) -> str:
    return f"<table>{''.join(rows)}</table>"


def _check(gate: Json, name: str) -> Json:
    return next((check for check in gate["checks"] if check["name"] == name), {})


def _shown(value: Any, form: str) -> str:
    return "–" if value is None else form.format(value).replace("-", "−")


def _section(head: str, note: str, body: str) -> str:
    return f'<section><h2>{head}</h2><p class="faint">{note}</p>{body}</section>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"
