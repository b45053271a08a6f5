"""Wake-up hints through Redis: subscriptions that stay between two waits, so that what comes meanwhile is not missed."""

from __future__ import annotations

from redis.asyncio import Redis
from redis.asyncio.client import PubSub


class Hints:
    """The channels that one process listens to, each on a connection of its own."""

    def __init__(self, prefix: str) -> None:
        """`prefix` stands before a hint's name in that of its channel."""
        self._prefix = prefix
        self._heard: dict[str, PubSub] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._heard

    def channel(self, name: str) -> str:
        return self._prefix + name

    async def listen(self, redis: Redis, name: str) -> bool:
        """Begin to listen to a channel; True, once that is so. Raises RedisError, OSError."""
        heard = redis.pubsub()
        try:
            await heard.subscribe(self.channel(name))
        except BaseException:
            await heard.aclose()
            raise
        self._heard[name] = heard
        return True

    async def hear(self, name: str) -> bool:
        """Wait until a hint comes, and take with it all that have come; True. Raises RedisError, OSError."""
        heard = self._heard[name]
        while (said := await heard.get_message(timeout=None)) is None or said["type"] != "message":
            pass
        while await heard.get_message(timeout=0.0) is not None:
            pass
        return True

    async def drop(self, name: str) -> None:
        """Stop listening, e.g. because the connection broke."""
        if name in self._heard:
            await self._heard.pop(name).aclose()

    async def close(self) -> None:
        for name in list(self._heard):
            await self.drop(name)
