"""The board in Redis: what servers that share traffic, and their learner, show each other.

Redis may be slow, full, restarted empty or away: an operation takes at most TIMEOUT_S, raises nothing, and after some
failures is not even tried for a while. What grows expires; for a Redis that is too small even so, `maxmemory-policy
volatile-ttl` is the right one.

    heed:<policy>:report:<name>, :activations, :epoch, :hint:<name>        one learner's, and its servers'
    heed::exchange:<reply>, :turn:<digest>, :receipt:<id>, :story:<id>, :quota:<digest of the caller>       of all
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from feedback.board import Board, Receipt, Story
from feedback.breaker import Breaker
from feedback.conversations import Place
from feedback.quotas import TAKE, Buckets
from feedback.redis_hints import Hints

TIMEOUT_S = 0.05
"""The longest that anyone waits for an answer, connecting included."""
CLOSE_S = 1.0
"""How long connections may take to end, and how long a person waits."""
HEAD = 600
"""Characters of an exchange in which its version stands: what people said comes last."""
_VERSION = re.compile(r'"version":(\d+)')
CONNECTIONS = 16
BATCH = 100
"""Stories written with one operation: as many as come through in a fraction of TIMEOUT_S."""

DAY_S = 86_400
EXCHANGE_S, TURN_S, RECEIPT_S, STORY_S = DAY_S, 7 * DAY_S, 7 * DAY_S, 30 * DAY_S
"""After so many seconds each is forgotten."""

T = TypeVar("T")


class RedisBoard(Board):
    """For one event loop, that of the first call. Making it connects to nothing."""

    def __init__(self, url: str, policy: str) -> None:
        """Raises ValueError where the URL's own parameters make no sense."""
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=None,  # each wait is bounded in `_ask`, by a clock that all of its steps share
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),  # a client's default may be ten, with sleep between them
            protocol=2,
            decode_responses=True,
        )
        self._redis = Redis.from_pool(pool)
        self._policy = f"heed:{policy}:"
        self._breaker = Breaker("Redis")
        self._buckets = Buckets()
        self._hints = Hints(self._policy + "hint:")
        self._first: dict[int, float] = {}  # activations, as far as this process knows: Redis may forget them
        self._repaying: asyncio.Task[dict[int, float]] | None = None
        self._owed = False  # whether Redis has missed some of them

    async def place(self, digests: Sequence[bytes]) -> Place | None:
        async def look(redis: Redis) -> Place | None:
            found = await redis.mget([f"heed::turn:{digest.hex()}" for digest in digests])
            return next((Place(*json.loads(place)) for place in found if place is not None), None)

        return await self._ask(look, None)

    async def remember_places(self, places: Mapping[bytes, Place]) -> None:
        def add(pipe: Pipeline) -> None:
            for digest, place in places.items():
                pipe.set(f"heed::turn:{digest.hex()}", json.dumps([place.conversation, place.turn]), ex=TURN_S)

        await self._tell(add)

    async def put_exchange(self, reply_id: str, exchange: str) -> None:
        await self._tell(lambda pipe: pipe.set(f"heed::exchange:{reply_id}", exchange, ex=EXCHANGE_S))

    async def get_exchange(self, reply_id: str) -> str | None:
        return await self._ask(lambda redis: redis.get(f"heed::exchange:{reply_id}"), None)

    async def versions(self, reply_ids: Sequence[str]) -> dict[str, int]:
        async def look(redis: Redis) -> dict[str, int]:
            async with redis.pipeline(transaction=False) as pipe:
                for reply_id in reply_ids:
                    pipe.getrange(f"heed::exchange:{reply_id}", 0, HEAD)
                heads = zip(reply_ids, await pipe.execute(), strict=True)
            found = ((reply_id, _VERSION.search(head)) for reply_id, head in heads)
            return {reply_id: int(version[1]) for reply_id, version in found if version}

        return await self._ask(look, {})

    async def remember_receipts(self, receipts: Sequence[Receipt]) -> None:
        def remember(pipe: Pipeline) -> None:
            for one in receipts:
                said = json.dumps([one.kind, one.body, one.at])
                pipe.set(f"heed::receipt:{one.feedback_id}", said, nx=True, ex=RECEIPT_S)

        await self._tell(remember)

    async def receipt(self, feedback_id: str) -> Receipt | None:
        async def look(redis: Redis) -> Receipt | None:
            said = await redis.get(f"heed::receipt:{feedback_id}")
            return None if said is None else Receipt(feedback_id, *json.loads(said))

        return await self._ask(look, None)

    async def take(self, caller: str, per_minute: int) -> float:
        """By Redis' clock and for all servers together; while it is away, by this process's own count."""
        who = hashlib.blake2b(caller.encode(), digest_size=16).hexdigest()
        wait_us: int | None = await self._ask(
            lambda redis: redis.eval(TAKE, 1, f"heed::quota:{who}", per_minute), None, wrote=True
        )
        return self._buckets.take(caller, per_minute) if wait_us is None else wait_us / 1e6

    async def activated(self, version: int, at: float) -> None:
        self._first[version] = min(at, self._first.get(version, at))
        if not await self._tell(lambda pipe: pipe.hsetnx(self._policy + "activations", str(version), str(at))):
            self._owed = True

    async def activations(self) -> dict[int, float]:
        """What Redis knows and what this process knows, which tells Redis what it has forgotten."""
        shared: dict[int, float] | None = await self._ask(self._shared_activations, None)
        if shared is not None:
            for version, at in shared.items():
                self._first[version] = min(at, self._first.get(version, at))
            missing: dict[Any, Any] = {str(v): str(at) for v, at in self._first.items() if shared.get(v, math.inf) > at}
            if missing:
                self._owed = not await self._tell(lambda pipe: pipe.hset(self._policy + "activations", mapping=missing))
        return dict(self._first)

    async def _shared_activations(self, redis: Redis) -> dict[int, float]:
        known = await redis.hgetall(self._policy + "activations")
        return {int(version): float(at) for version, at in known.items()}

    async def write_stories(self, stories: Mapping[str, Sequence[Story]]) -> bool:
        def add(some: Sequence[str], pipe: Pipeline) -> None:
            for feedback_id in some:
                steps: dict[Any, Any] = {status: json.dumps(rest) for status, *rest in stories[feedback_id]}
                pipe.hset(f"heed::story:{feedback_id}", mapping=steps)
                pipe.expire(f"heed::story:{feedback_id}", STORY_S)

        ids = [feedback_id for feedback_id, steps in stories.items() if steps]
        for begin in range(0, len(ids), BATCH):
            if not await self._tell(partial(add, ids[begin : begin + BATCH])):
                return False
        return True

    async def steps(self, feedback_id: str) -> list[Story]:
        async def look(redis: Redis) -> list[Story]:
            found: Mapping[Any, Any] = await redis.hgetall(f"heed::story:{feedback_id}")
            return [Story(status, *json.loads(rest)) for status, rest in found.items()]

        return await self._ask(look, [])

    async def set_report(self, name: str, report: str) -> None:
        await self._tell(lambda pipe: pipe.set(f"{self._policy}report:{name}", report))

    async def report(self, name: str) -> str | None:
        return await self._ask(lambda redis: redis.get(f"{self._policy}report:{name}"), None)

    async def forgot(self) -> bool:
        """An epoch is a run of Redis: one that was started again may have begun with an older state than it ended."""

        async def look(redis: Redis) -> bool:
            return bool(await redis.get(self._policy + "epoch") != await _run_of(redis))

        return await self._ask(look, False)

    async def begin_epoch(self) -> bool:
        async def write(redis: Redis) -> bool:
            return bool(await redis.set(self._policy + "epoch", await _run_of(redis)))

        return await self._ask(write, False, wrote=True)

    async def hint(self, name: str) -> None:
        await self._ask(lambda redis: redis.publish(self._hints.channel(name), ""), 0)

    async def wait_for_hint(self, name: str, at_most_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        until = clock() + at_most_s
        try:
            async with asyncio.timeout_at(until):
                if name in self._hints or await self._ask(lambda redis: self._hints.listen(redis, name), False):
                    return await self._hints.hear(name)
        except TimeoutError:
            return False
        except (RedisError, OSError):  # the connection broke: the next call makes another
            await self._hints.drop(name)
        await asyncio.sleep(until - clock())
        return False

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError, RedisError, OSError):
            async with asyncio.timeout(CLOSE_S):
                if self._repaying is not None:
                    await self._repaying
                await self._hints.close()
                await self._redis.aclose()

    async def trouble(self) -> str | None:
        """Why Redis cannot be used, in words; None where it can (for `heed check`, which may wait longer than others)."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._redis.set(self._policy + "check", "", ex=1)
        except TimeoutError:
            return f"it does not answer within {CLOSE_S:g} s"
        except (RedisError, OSError) as error:
            return str(error)
        return None

    async def _tell(self, add: Callable[[Pipeline], object]) -> bool:
        """Have Redis do what `add` puts into a pipeline; True once it has."""

        async def tell(redis: Redis) -> bool:
            async with redis.pipeline(transaction=False) as pipe:
                add(pipe)
                for answer in await pipe.execute(raise_on_error=False):  # else its errors quote what people said
                    if isinstance(answer, Exception):
                        raise answer
            return True

        return await self._ask(tell, False, wrote=True)

    async def _ask(self, question: Callable[[Redis], Awaitable[Any]], otherwise: T, wrote: bool = False) -> T:
        """The answer; `otherwise` where there is none in time, or Redis is not asked because it is known to be away."""
        if not self._breaker.may_ask():
            return otherwise
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer: T = await question(self._redis)
        except (ResponseError, ValueError, TypeError) as error:  # full, forbidden, or not written by a Heed like this
            self._breaker.refused(error)
            return otherwise
        except TimeoutError:
            self._breaker.failed(TimeoutError(f"no answer within {TIMEOUT_S * 1000:g} ms"))
            return otherwise
        except (RedisError, OSError) as error:
            self._breaker.failed(error)
            return otherwise
        except BaseException:
            self._breaker.gave_up()
            raise
        self._breaker.answered(wrote)
        if self._owed:
            self._owed = False
            self._repaying = asyncio.create_task(self.activations())  # not in the time of who asked
        return answer


async def _run_of(redis: Redis) -> Any:
    """What names this run of Redis; empty where a proxy hides it."""
    return (await redis.info("server")).get("run_id", "")
