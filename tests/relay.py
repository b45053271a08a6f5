"""A network that can be cut: a relay in front of a port, which passes bytes on both ways until a lever is pulled."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading

PIECE = 65536
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: a connection that is closed is reset."""


class Relay:
    """Listens on `port`. Its levers may be pulled from any thread, and work on open connections as on new ones."""

    def __init__(self, behind: int = 0) -> None:
        """`behind`: the port that it stands in front of; may be set later."""
        self.behind = behind
        self._delay_s = 0.0
        self._cut = self._halved = False
        self._open: set[asyncio.StreamWriter] = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._loop: asyncio.AbstractEventLoop
        self._over: asyncio.Event
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(ready)), name="relay")
        self._thread.start()
        ready.wait()

    def delay(self, seconds: float) -> None:
        """Every piece takes so much longer, each way."""
        self._delay_s = seconds

    def cut(self) -> None:
        """Every connection is reset, and so is each new one."""
        self._cut = True
        self._loop.call_soon_threadsafe(self._reset_all)

    def halve(self) -> None:
        """What is asked comes through; of the next answer the first half, and then nothing any more, healed or not."""
        self._halved = True

    def heal(self) -> None:
        """New connections are well. Those that lost something stay silent, as they would behind a router that forgot them."""
        self._delay_s, self._cut, self._halved = 0.0, False, False

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _run(self, ready: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._serve, sock=self._listening):
            ready.set()
            await self._over.wait()
            self._reset_all()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            if self._cut:
                return
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self.behind)
            self._open.add(inner_writer)
            try:
                there = asyncio.create_task(self._pass_on(reader, inner_writer, answers=False))
                back = asyncio.create_task(self._pass_on(inner_reader, writer, answers=True))
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
                for way in (there, back):
                    way.cancel()
                await asyncio.gather(there, back, return_exceptions=True)
            finally:
                self._reset(inner_writer)
        except OSError:  # nobody behind us
            pass
        finally:
            self._reset(writer)

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        """One way of one connection, until either end closes it."""
        lost = False
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if lost:
                    continue
                lost = answers and self._halved
                writer.write(piece[: len(piece) // 2] if lost else piece)
                await writer.drain()

    def _reset_all(self) -> None:
        for writer in list(self._open):
            self._reset(writer)

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        self._open.discard(writer)
        if not writer.is_closing():
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()
