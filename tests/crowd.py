"""People who chat and rate over HTTP, through every outage, and note what they were promised."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx

from learner.report import feedback_counts
from learner.state import State
from tests.house import House, until

CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
ANSWER_S = 60.0
"""Who has no answer after so long takes it that there will be none: the server's own waits end after 30 s, and a virtual
machine may stand still for a minute."""
GOT_ON = ("joined", "in_reward_model", "in_update", "in_version", "served")


class _Answer(NamedTuple):
    body: dict[str, Any]
    life: int
    """The server's (House.life), when it was asked for."""


@dataclass
class Crowd:
    """Each chats and rates one reply after the other, and asks again until it is answered. Every other one streams."""

    house: House
    size: int = 4
    every_s: float = 0.0
    """Seconds from one exchange of a person to the next; who was kept waiting makes up for it."""
    ids: bool = True
    """Whether feedback names an id, by which it counts once however often it is sent."""
    leaving: threading.Event = field(default_factory=threading.Event, repr=False)
    promised: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The receipts' ids, with what was said: kind and value."""
    versions: set[str] = field(default_factory=set)
    replies: int = 0
    unkept: set[str] = field(default_factory=set)
    """Replies that the server could not keep, as their answers said."""
    oddities: list[str] = field(default_factory=list)
    outages: int = 0
    """Requests without an answer, or without its end."""
    cut_streams: int = 0
    """Those of them whose answer had begun."""
    slowest_s: float = 0.0
    """How long an answer took at most."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Clean errors, by route and status."""
    troubles: frozenset[str] = frozenset()
    """What is broken right now."""
    taken: Counter[str] = field(default_factory=Counter)
    """How much feedback was accepted while this was broken."""

    def __post_init__(self) -> None:
        self._failed = False
        self._lives: set[int] = set()
        self._lock = threading.Lock()
        self.people = [threading.Thread(target=self.person, args=(number,)) for number in range(self.size)]
        for person in self.people:
            person.start()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """Everyone leaves, once answered; at once where the test has failed."""
        self.leaving.set()
        self._failed = failure is not None
        for person in self.people:
            person.join()

    def __str__(self) -> str:
        """What it has been through, in numbers."""
        return (
            f"{self.replies} replies ({len(self.unkept)} not kept), {len(self.promised)} feedback accepted, "
            f"{self.outages} requests cut off, slowest answer {self.slowest_s:.1f} s, refused: {dict(self.refusals)}, "
            f"accepted while: {dict(self.taken)}"
        )

    def person(self, number: int) -> None:
        chance = random.Random(number)
        said = 0
        begun = time.monotonic() + self.every_s * number / self.size
        with httpx.Client(base_url=self.house.url, timeout=ANSWER_S) as http:
            while not self.leaving.wait(begun + said * self.every_s - time.monotonic() if self.every_s else 0):
                said += 1
                message = {"role": "user", "content": f"{number} says {said}"}
                chat = {"model": "default", "messages": [message], "max_tokens": 6, "user": f"user-{number}"}
                reply = self.insist(http, CHAT, chat | ({"stream": True} if number % 2 else {}))
                rating: dict[str, Any] = {"kind": "rating", "value": chance.randint(1, 5)}
                thumb: dict[str, Any] = {"kind": "thumb", "value": chance.choice(["up", "down"])}
                opinion = chance.choice([rating, thumb])
                named = {"reply_id": reply.body["id"], "user": f"user-{number}"}
                own = {"id": f"{number}-{said}"} if self.ids else {}
                self.rate(http, reply, opinion, named | own)

    def rate(self, http: httpx.Client, reply: _Answer, opinion: dict[str, Any], named: dict[str, Any]) -> None:
        heed = reply.body["heed"]
        with self._lock:
            self.replies += 1
            self.versions.add(heed["version"])
        if heed["kept"]:
            before = self.troubles
            receipt = self.insist(http, FEEDBACK, {**opinion, **named}).body
            value = {"up": 1.0, "down": 0.0}.get(opinion["value"], opinion["value"])
            self.promised[receipt["id"]] = (opinion["kind"], float(value))
            with self._lock:
                self.taken.update(before & self.troubles)
            return
        self.unkept.add(named["reply_id"])
        answer = self.ask(http, FEEDBACK, {**opinion, **named})
        if answer is not None and answer.status_code != 409 and self.house.life == reply.life:
            self.odd(f"feedback on a reply that was not kept: {answer.status_code} {answer.text[:300]}")

    def insist(self, http: httpx.Client, path: str, body: dict[str, Any]) -> _Answer:
        """Ask until there is an answer."""
        while not self._failed:
            life = self.house.life
            answer = self.ask(http, path, body)
            if answer is not None and answer.status_code in (200, 202):
                return _Answer(_parsed(answer), life)
            if answer is not None and answer.status_code not in (429, 503):
                self.odd(f"{path}: {answer.status_code} {answer.text[:300]}")
            time.sleep(0.05)
        raise SystemExit

    def ask(self, http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response | None:
        """The answer, which is whole; None where the server was away."""
        life, began = self.house.life, time.monotonic()
        known = life in self._lives
        try:
            answer = http.post(path, json=body)
        except httpx.TimeoutException as error:
            self.odd(f"{path}: no answer within {time.monotonic() - began:.1f} s ({error!r})")
        except httpx.TransportError as error:
            if known and life == self.house.life:
                self.odd(f"{path}: cut off by a server that nobody touched ({error!r})")
            with self._lock:
                self.outages += 1
                self.cut_streams += "incomplete chunked read" in str(error)
            return None
        with self._lock:
            self._lives.add(life)
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        if answer.is_error:
            with self._lock:
                self.refusals[f"{path} {answer.status_code}"] += 1
            if answer.json()["error"].keys() != {"message", "type", "param", "code"}:
                self.odd(f"{path}: {answer.status_code}, and not in OpenAI's shape: {answer.text[:300]}")
        return answer

    def odd(self, what: str) -> None:
        """Note what must not be, and leave."""
        self.oddities.append(what)
        raise SystemExit  # of this person's thread

    def until_everyone_was_heard(self, last: int | None = None) -> None:
        """Until the learner has joined what was promised (the last so many), as its own story tells."""
        with httpx.Client(base_url=self.house.url, timeout=ANSWER_S) as http:
            for receipt in list(self.promised)[-last if last else 0 :]:
                until(
                    lambda receipt=receipt: http.get(f"{FEEDBACK}/{receipt}").json()["status"] in GOT_ON,  # type: ignore[misc]
                    f"feedback {receipt} was absorbed",
                )


def _parsed(answer: httpx.Response) -> dict[str, Any]:
    """The answer's body; of a stream the last chunk, once it is seen to be whole, and of one version."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        body: dict[str, Any] = answer.json()
        return body
    *lines, done = (line.removeprefix("data: ") for line in answer.text.splitlines() if line)
    assert done == "[DONE]", answer.text
    chunks: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert {chunk["model"] for chunk in chunks} == {answer.headers["x-heed-version"]}, answer.text
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length"), answer.text
    return chunks[-1]


def counts_each_once(crowd: Crowd, state: State) -> None:
    """What was promised is in the state as it was said. Nothing else is, but what was said of replies that were not kept.

    What is not promised was asked for and never answered: people ask again until they are.
    """
    rows = state.db.execute("SELECT id, kind, value, status, reply_id FROM feedback")
    kept = {feedback_id: rest for feedback_id, *rest in rows}
    assert {receipt: (kept.get(receipt) or [])[:3] for receipt in crowd.promised} == {
        receipt: [*said, "joined"] for receipt, said in crowd.promised.items()
    }
    assert {kept[receipt][3] for receipt in kept.keys() - crowd.promised.keys()} <= crowd.unkept
    assert {judgement.feedback_id for judgement in state.judgements()} == set(crowd.promised)
    assert feedback_counts(state)["dropped"] == {}
