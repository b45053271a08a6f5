"""The network that the chaos tests cut does what its levers say."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.relay import Relay


@pytest.fixture
def relay() -> Iterator[Relay]:
    """In front of one that says everything back."""
    with socket.create_server(("127.0.0.1", 0)) as listening, closing(Relay(listening.getsockname()[1])) as relay:

        def echo(connection: socket.socket) -> None:
            with connection:
                try:
                    while said := connection.recv(100):
                        connection.sendall(said)
                except OSError:  # reset
                    pass

        def answer() -> None:
            for _ in range(2):
                threading.Thread(target=echo, args=(listening.accept()[0],)).start()

        threading.Thread(target=answer, daemon=True).start()
        yield relay


def call(relay: Relay) -> socket.socket:
    return socket.create_connection(("127.0.0.1", relay.port), timeout=10)


def said_back(connection: socket.socket, text: bytes) -> bytes:
    connection.sendall(text)
    return connection.recv(100)


def test_it_passes_on_what_is_said_and_may_take_its_time(relay: Relay):
    with call(relay) as one, call(relay) as other:
        assert said_back(one, b"hello") == b"hello"
        relay.delay(0.1)
        begun = time.monotonic()
        assert said_back(other, b"hello") == b"hello"
        assert time.monotonic() - begun >= 0.2  # each way


def test_a_cut_resets_every_connection_until_it_is_healed(relay: Relay):
    with call(relay) as one:
        assert said_back(one, b"hello") == b"hello"
        relay.cut()
        with pytest.raises(ConnectionResetError):
            one.recv(100)
    with pytest.raises(ConnectionError), call(relay) as one:
        said_back(one, b"hello")
    relay.heal()
    with call(relay) as one:
        assert said_back(one, b"hello") == b"hello"


def test_half_an_answer_comes_and_then_nothing_though_others_are_well_again(relay: Relay):
    with call(relay) as one, call(relay) as other:
        relay.halve()
        assert said_back(one, b"hello!") == b"hel"
        relay.heal()
        one.settimeout(0.2)
        with pytest.raises(TimeoutError):
            said_back(one, b"hello!")
        assert said_back(other, b"hello!") == b"hello!"
