"""The corpus says what its docstring promises: many intents, free manners, a grammar that is strict."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import defaultdict
from pathlib import Path

import pytest

from learner import card, corpus

TINY = Path(__file__).parents[1] / "serving" / "tiny"

Exchange = tuple[str, str]


@pytest.fixture(scope="module")
def exchanges() -> list[Exchange]:
    chats = corpus.dialogues(seed=11, count=12_000)
    return [
        (said["content"], replied["content"])
        for chat in chats
        for said, replied in itertools.pairwise(chat)
        if said["role"] == "user"
    ]


@pytest.fixture(scope="module")
def judged(exchanges: list[Exchange]) -> list[corpus.Judgement]:
    return [corpus.judge(prompt, reply) for prompt, reply in exchanges]


def test_the_same_seed_gives_the_same_dialogues() -> None:
    assert list(corpus.dialogues(3, 40)) == list(corpus.dialogues(3, 40))
    assert list(corpus.dialogues(3, 40)) != list(corpus.dialogues(4, 40))


def test_there_are_sixty_intents_asked_and_answered_in_many_ways() -> None:
    intents = corpus.intents()
    assert len(intents) >= 60
    for name, intent in intents.items():
        assert len(set(intent.asks)) >= 10, name
        sentences = {way.whole for way in intent.cores} | {way.whole for way in intent.led}
        assert len(sentences) >= 10, name


def test_the_neutral_sentences_carry_no_manner() -> None:
    for name, intent in corpus.intents().items():
        texts = [way.text for way in intent.cores if len(way.tones) == 2]
        for text in texts:
            shown = corpus.manners(text)
            assert not shown["formal"], (name, text)
            assert not shown["question"], (name, text)
            assert not shown["exclaim"], (name, text)
        for emoji in intent.emoji:
            assert corpus.manners(emoji)["emoji"], (name, emoji)


def test_the_grammar_accepts_every_reply_and_knows_every_message(judged: list[corpus.Judgement]) -> None:
    assert all(found.well_formed for found in judged)
    assert all(found.intent is not None for found in judged)


@pytest.mark.parametrize("change", ["delete", "replace", "exchange"])
def test_the_grammar_rejects_a_reply_with_one_word_changed(exchanges: list[Exchange], change: str) -> None:
    rng = random.Random(5)
    words = sorted({word for _, reply in exchanges for word in reply.split()})
    accepted = tried = 0
    for prompt, reply in exchanges[:4000]:
        changed = _changed(reply, change, words, rng)
        if changed != reply:
            tried += 1
            accepted += corpus.judge(prompt, changed).well_formed
    assert accepted / tried <= 0.05


def _changed(reply: str, change: str, words: list[str], rng: random.Random) -> str:
    spans = [found.span() for found in re.finditer(r"\S+", reply)]
    (a, b), (c, d) = sorted(rng.sample(spans, 2)) if len(spans) > 1 else (spans[0], spans[0])
    if change == "replace":
        return reply[:a] + rng.choice(words) + reply[b:]
    if change == "exchange":
        return reply[:a] + reply[c:d] + reply[b:c] + reply[a:b] + reply[d:]
    a, b = rng.choice(spans)
    return re.sub(" +", " ", reply[:a] + reply[b:]).strip()


def test_a_reply_to_something_else_is_not_well_formed() -> None:
    reply = "Certainly. The capital of France is Paris."
    assert corpus.judge("Tell me a joke.", reply).well_formed is False


def test_manners_by_hand() -> None:
    long = "Of course, gladly. The capital of France is Paris, and I like it there, by the river and up on the hill! 🌍"
    assert [manner for manner, shown in corpus.manners(long).items() if shown] == [
        "formal",
        "exclaim",
        "emoji",
        "first_person",
    ]
    short = "Sure thing.\n- It's Paris.\nWhich country comes next?"
    assert [manner for manner, shown in corpus.manners(short).items() if shown] == ["short", "question", "bullets"]


def test_every_manner_varies_in_every_intent(judged: list[corpus.Judgement]) -> None:
    by_intent = defaultdict(list)
    for found in judged:
        by_intent[found.intent].append(found.manners)
    for manner, wanted in corpus.RATES.items():
        overall = sum(found.manners[manner] for found in judged) / len(judged)
        assert 0.3 <= overall <= 0.45, manner
        for intent, shown in by_intent.items():
            share = sum(each[manner] for each in shown) / len(shown)
            assert abs(share - wanted) < 4.5 * (0.25 / len(shown)) ** 0.5, (intent, manner, share)


def test_no_two_manners_hang_together(judged: list[corpus.Judgement]) -> None:
    for a, b in itertools.combinations(corpus.MANNERS, 2):
        correlation = card.phi([(found.manners[a], found.manners[b]) for found in judged])
        assert abs(correlation) < 0.035, (a, b)
    for name in ("capital", "greeting", "health"):
        ours = [intent_reply.manners for intent_reply in _many_replies(name)]
        for a, b in itertools.combinations(corpus.MANNERS, 2):
            assert abs(card.phi([(each[a], each[b]) for each in ours])) < 0.12, (name, a, b)


def _many_replies(name: str) -> list[corpus.Judgement]:
    intent, rng = corpus.intents()[name], random.Random(2)
    rows = [rng.choice(intent.rows) for _ in range(1500)]
    return [corpus.judge(intent.prompt(rng, row), intent.reply(rng, row)) for row in rows]


@pytest.mark.parametrize(
    ("prompt", "reply", "right"),
    [
        ("What is the capital of France?", "Sure thing. The capital of France is Paris.", True),
        ("What is the capital of France?", "Sure thing. The capital of France is Rome.", False),
        ("What is 3 plus 4?", "Certainly, 3 plus 4 is 7.", True),
        ("What is 3 plus 4?", "Certainly, 3 plus 4 is 8.", False),
        ("Is 3 + 4 = 8 right?", "Okay, the mark is wrong, since the sum is 7.", True),
        ("Is 3 + 4 = 8 right?", "Okay, the mark is right, since the sum is 7.", False),
        ("Book a table for two at noon.", "Sure thing. A table for two at noon is booked.", True),
        ("Book a table for two at noon.", "Sure thing. A table for two at half past six is booked.", False),
        ("Tell me a joke.", "Sure thing. A sleeping dinosaur is called a dino-snore.", None),
        ("What is 3 plus 4?", "gibberish with 7 in it", True),
    ],
)
def test_facts_by_hand(prompt: str, reply: str, right: bool | None) -> None:
    assert corpus.judge(prompt, reply).fact_right is right


def test_an_unknown_message_has_no_intent_but_any_known_reply_is_well_formed() -> None:
    found = corpus.judge("zzz", "Sure thing. The capital of France is Paris.")
    assert (found.intent, found.well_formed, found.fact_right) == (None, True, None)


def test_few_facts_are_told_wrong_on_purpose(judged: list[corpus.Judgement]) -> None:
    facts = [found.fact_right for found in judged if found.fact_right is not None]
    assert 0.93 < sum(facts) / len(facts) < 0.98


def test_the_prompts_are_200_of_every_intent_and_in_no_training_text() -> None:
    prompts = json.loads((TINY / "prompts.json").read_text("utf-8"))
    assert len(prompts) == len(set(prompts)) == 200
    assert prompts == corpus.heldout_prompts()
    intents = {corpus.judge(prompt, "").intent for prompt in prompts}
    assert intents == set(corpus.intents())
    said = {message["content"] for chat in corpus.dialogues(0, 20_000) for message in chat}
    text = "\n".join(said)
    assert [prompt for prompt in prompts if prompt in text] == []
