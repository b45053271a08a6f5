"""The server process: what it holds, how it starts, and how it leaves without cutting anybody off.

HTTP runs in the main thread's event loop, the engine's steps in a thread of their own, the model is loaded in another,
so that /health and /ready answer from the first second. On SIGTERM or SIGINT: /ready says 503 at once; chats are still
answered for `drain_delay_s`, until a proxy has noticed; then nobody is let in any more, who is in and has not asked yet
gets a moment to do so, streams are finished, each within its own deadline, the log is brought to disk, and the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client import disable_created_metrics
from transformers import PreTrainedModel

from feedback.board import open_board
from feedback.config import SettingError
from feedback.events import EXCHANGES, FEEDBACK
from feedback.log import LogUnavailable, open_log
from serving.adapters import AdapterStore, describe_base
from serving.app import base_name, create_app, follow_hints, on_swap
from serving.chat import Chat
from serving.claims import LEAVING, CannotStart, hold, listen, prepare_folder, turn_away
from serving.config import ServingConfig
from serving.cores import cores
from serving.engine import Engine, ModelError, load_model
from serving.exits import Exit
from serving.ids import Ids, load_secret
from serving.keys import Keys
from serving.lora import target_modules
from serving.model import find_model, stored_as_bfloat16
from serving.native import Native
from serving.products import computes_bfloat16
from serving.routes.wiring import Speaker, Wiring
from serving.swap import Swapper

if TYPE_CHECKING:
    from serving.traces import Traces

LONGEST_UNASKED = 4096
"""Tokens of prompt and reply where no setting says more: memory is set aside for each row."""
SETTLE_S = 10.0
"""After the last connection is gone, how long exchanges may take to reach the log."""
_LINGER_S = 1.0
"""From the closing of the door to that of idle connections, at most: a request may be on its way."""
_ENTER_S = 0.05
"""In which who has begun to connect is in."""
_KEEP_ALIVE_S = 75
"""Longer than common clients keep an idle connection, so that they close it, and never send into a closed one."""

_log = logging.getLogger(__name__)


def serve(config: ServingConfig) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code (serving/exits.py). A failed start says why in one line."""
    # they double what is scraped, and tell nothing that the totals do not
    disable_created_metrics()  # type: ignore[no-untyped-call]
    try:
        keys, traces = _keys(config), _traces(config)
        with contextlib.ExitStack() as held:
            prepare_folder(config.feedback.data)
            lock = held.enter_context(hold(config.feedback.data / "server.lock"))
            if traces is not None:
                held.callback(traces.close)
            app = held.enter_context(_application(config, keys, traces))
            sockets = listen(config.host, config.port, private=not (keys or config.insecure))
            address = _address(config.host, sockets[0])
            os.write(lock, f"{os.getpid()} {address}\n".encode())
            server = _Server(config, app, address, on_leaving=lambda: os.write(lock, LEAVING))
            asyncio.run(server.run(sockets))
    except CannotStart as error:
        print(f"heed: {error}", file=sys.stderr)
        return error.code
    if server.loading:
        # told to stop before the model was there: the interpreter would abort at a thread that is inside torch
        logging.shutdown()
        os._exit(Exit.DONE)
    return Exit.DONE


class _Server(uvicorn.Server):
    """uvicorn, with signals, loading and leaving by Heed's rules."""

    def __init__(self, config: ServingConfig, app: FastAPI, address: str, on_leaving: Callable[[], object]) -> None:
        patience = int(config.request_timeout_s + SETTLE_S) + 1
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                ws="none",
                log_config=None,
                log_level=logging.WARNING,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=patience,
            )
        )
        self._settings = config
        self._address = address
        self._on_leaving = on_leaving
        self._wiring: Wiring = app.state.wiring
        self._failure: BaseException | None = None
        self._loader = threading.Thread(target=self._load, name="heed-load", daemon=True)

    @property
    def loading(self) -> bool:
        return self._loader.is_alive()

    async def run(self, sockets: list[socket.socket]) -> None:  # type: ignore[override]
        """Load, serve, drain. Raises CannotStart when the model cannot be loaded."""
        self._loop = self._wiring.loop = loop = asyncio.get_running_loop()
        # named, both: a job started in the background of a shell begins with SIGINT ignored
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        self._loader.start()
        hints = loop.create_task(follow_hints(self._wiring))
        await self.serve(sockets)
        hints.cancel()
        await self._close()
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are handled in `run`; uvicorn's own handlers would close the socket at once."""
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the door so that nobody who got in, or had a foot in it, is cut off unheard; then uvicorn's own way.

        uvicorn alone would reset connections that it has not accepted yet, and close those whose request is on its way.
        """
        if self._settings.drain_delay_s:
            for listening in sockets or []:
                turn_away(listening)
            await asyncio.sleep(_ENTER_S)
        for server in self.servers:
            server.close()
        give_up = time.monotonic() + min(_LINGER_S, self._settings.drain_delay_s)
        while self.server_state.connections and time.monotonic() < give_up:
            await asyncio.sleep(_ENTER_S)
        await super().shutdown(sockets)

    def _told_to_stop(self, number: signal.Signals) -> None:
        """The first signal begins the drain, further SIGINTs hurry it: no more delay, then no more patience."""
        if not self._wiring.draining:
            delay = self._settings.drain_delay_s if self._wiring.ready else 0.0
            self._wiring.draining = True
            with contextlib.suppress(OSError):  # a full disk must not keep it from stopping
                self._on_leaving()
            _log.info("%s: serving on for %g s, then finishing what is running.", signal.Signals(number).name, delay)
            asyncio.get_running_loop().call_later(delay, setattr, self, "should_exit", True)
        elif number == signal.SIGINT:
            self.force_exit = self.should_exit
            self.should_exit = True

    def _load(self) -> None:
        """In a thread of its own: load the model and let it speak, or have the server end."""
        try:
            speaker = load_speaker(self._settings, self._wiring)
            # what is there now lives as long as the process: each full collection would look at all of it, and stop
            # every stream for a quarter of a second
            gc.collect()
            gc.freeze()
        except BaseException as error:
            self._failure = error
            with contextlib.suppress(RuntimeError):  # the loop is closed: told to stop meanwhile
                self._loop.call_soon_threadsafe(setattr, self, "should_exit", True)
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._speak, speaker)

    def _speak(self, speaker: Speaker) -> None:
        self._wiring.speaker = speaker
        version = f"{self._wiring.store.policy}@v{speaker.engine.current}"
        _log.info("Heed serves %s, on %s, at %s", version, self._wiring.base_name, self._address)

    async def _close(self) -> None:
        """Everyone has been answered: let what was said reach the log, then stop the engine."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._wiring.settle(), SETTLE_S)
        if self._wiring.speaker is not None:
            await asyncio.to_thread(self._wiring.speaker.swapper.close)
            await asyncio.to_thread(self._wiring.speaker.engine.close)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wiring.settle(), SETTLE_S)
        await self._wiring.board.close()


def load_base(config: ServingConfig) -> tuple[PreTrainedModel, Chat]:
    """The base in the type that `auto` stands for here: bfloat16 where it is stored so and computed with fast.

    Raises ModelError.
    """
    if config.dtype == "auto" and stored_as_bfloat16(config.model):
        model, chat = load_model(config.model, config.device, "bfloat16")
        fast = computes_bfloat16() or Native.library(model, target_modules(model)) is not None
        if model.device.type != "cpu" or fast:
            return model, chat
        del model, chat
    return load_model(config.model, config.device, config.dtype)


def load_speaker(config: ServingConfig, wiring: Wiring) -> Speaker:
    """Load the base, start the engine, and bring it to the version that the release names. Raises CannotStart."""
    torch.set_num_threads(config.threads or min(torch.get_num_threads(), cores()))
    try:
        model, chat = load_base(config)
        folder = find_model(config.model)
        engine = Engine(
            model,
            chat,
            rows=config.max_rows,
            max_len=longest(config, model.config),
            max_waiting=config.max_waiting,
            packed=config.packed,
            prefix_tokens=config.prefix_tokens,
        )
        base = describe_base(model, chat, folder)
    except ModelError as error:
        raise CannotStart(Exit.MODEL, str(error)) from error
    except (RuntimeError, MemoryError) as error:
        raise CannotStart(
            Exit.MODEL,
            f"the engine cannot be set up: {str(error).splitlines()[0]}; "
            f"HEED_MAX_ROWS={config.max_rows}, HEED_MAX_MODEL_LEN={config.max_model_len} and "
            f"HEED_PREFIX_TOKENS={config.prefix_tokens} may be too much for the memory",
        ) from error
    told = partial(on_swap, wiring)
    swapper = Swapper(wiring.store, engine, base, on_activated=told, on_failed=told, on_drained=told)
    _log.info("Replies are computed by %s, in %s.", engine.way, str(model.dtype).removeprefix("torch."))
    if engine.copied_bytes:
        _log.info("The weights are laid out once more for fast products: %.0f MB.", engine.copied_bytes / 1e6)
    engine.start()
    swapper.start()
    return Speaker(engine, chat, base, swapper, folder)


def longest(config: ServingConfig, model: object) -> int:
    """Tokens of prompt and reply together, by the settings and the model's own configuration.

    Raises CannotStart when more are set than the model can.
    """
    most = getattr(model, "max_position_embeddings", None) or LONGEST_UNASKED
    if config.max_model_len > most:
        raise CannotStart(
            Exit.SETTING,
            f"HEED_MAX_MODEL_LEN={config.max_model_len}: must be at most {most}, which is what "
            f"{base_name(config.model)} can, or 0 for that.",
        )
    return config.max_model_len or min(most, LONGEST_UNASKED)


def _keys(config: ServingConfig) -> Keys | None:
    """The API keys; None where nobody needs one. Raises CannotStart."""
    try:
        return Keys(config.api_keys_file) if config.api_keys_file is not None else None
    except SettingError as error:
        raise CannotStart(Exit.SETTING, str(error)) from error


def _traces(config: ServingConfig) -> Traces | None:
    """Where traces go; None where nobody wants any: then nothing of OpenTelemetry's SDK is imported. Raises CannotStart."""
    if config.traces is None:
        return None
    try:
        from serving.traces import Traces, exporting
    except ImportError:
        missing = "HEED_TRACES needs OpenTelemetry: pip install 'heed[otel]'"
        raise CannotStart(Exit.SETTING, missing) from None
    return Traces(config, exporting(config.traces))


@contextlib.contextmanager
def _application(config: ServingConfig, keys: Keys | None, traces: Traces | None) -> Iterator[FastAPI]:
    """The application over the parts that last as long as the process. Raises CannotStart."""
    feedback = config.feedback
    try:
        ids = Ids(load_secret(feedback))
        log = open_log(feedback, writes=(EXCHANGES, FEEDBACK), outbox=True)
    except (OSError, ValueError, LogUnavailable) as error:
        raise CannotStart(Exit.DATA, f"{error} (HEED_DATA={feedback.data})") from error
    with contextlib.closing(log):
        store = AdapterStore(config.adapter_root, feedback.policy)
        board = open_board(feedback, "server")
        yield create_app(config, ids=ids, log=log, board=board, store=store, keys=keys, traces=traces)


def _address(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
