"""What a server takes for itself before it starts: its data folder, the lock on it, and its sockets."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from serving.exits import Exit

LEAVING = b"leaving\n"
"""What the holder of a lock adds to its file once it has begun to stop."""

_SO_ATTACH_FILTER = 26


class CannotStart(Exception):
    """A server cannot start as things are. The message is one line for people."""

    def __init__(self, code: Exit, message: str) -> None:
        super().__init__(message)
        self.code = code


def prepare_folder(folder: Path) -> None:
    """Make the data folder, and try whether it can be written. Raises CannotStart."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CannotStart(
            Exit.DATA, f"the data folder {folder} cannot be written: {error.strerror}. Set HEED_DATA to one that can."
        ) from error


@contextlib.contextmanager
def hold(path: Path, patience_s: float = 60.0) -> Iterator[int]:
    """Hold the OS lock of this file, which says who holds it; yields its open descriptor.

    The system frees it however the process ends. A holder that wrote LEAVING is waited for, `patience_s` at most. Raises
    CannotStart when another process holds it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        give_up = time.monotonic() + patience_s
        while not _locked(descriptor):
            holder = os.pread(descriptor, 1000, 0)
            if not holder.endswith(LEAVING) or time.monotonic() > give_up:
                pid, _, address = holder.decode(errors="replace").partition("\n")[0].partition(" ")
                raise CannotStart(
                    Exit.HELD,
                    f"the data folder {path.parent} belongs to a server that is running (pid {pid or 'unknown'}"
                    f"{f', {address}' if address else ''}). Stop that one, or set HEED_DATA to another folder.",
                )
            time.sleep(0.1)
        os.ftruncate(descriptor, 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_loopback(host: str, addresses: set[str]) -> None:
    """Raises CannotStart unless all that this host name stands for is reached from this machine alone."""
    for address in sorted(addresses):
        if not ipaddress.ip_address(address).is_loopback:
            raise CannotStart(
                Exit.SETTING,
                f"HEED_HOST={host}: others may reach {address}, and without API keys anyone may chat and rate. Set "
                "HEED_API_KEYS_FILE to a file of keys, or HEED_INSECURE=1 (--insecure) where only friends get there.",
            )


def listen(host: str, port: int, *, private: bool = False) -> list[socket.socket]:
    """Sockets that listen on every address of this host name; `private`: all must be loopback. Raises CannotStart."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        if private:
            _check_loopback(host, {str(where[0]) for *_, where in found})
        for family, _, _, _, where in dict.fromkeys(found):
            if sockets and port == 0:
                break  # a free port of one address may be taken on another
            # named, or asyncio would not set TCP_NODELAY, and each answer wait 40 ms for an acknowledgement
            opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
            sockets.append(opened)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(where)
            # at once: until a socket listens, another process may bind the same port
            opened.listen(2048)
    except (OSError, UnicodeError) as error:
        for opened in sockets:
            opened.close()
        reason = getattr(error, "strerror", None) or error
        raise CannotStart(
            Exit.PORT,
            f"cannot listen on {host}, port {port}: {reason}. Set HEED_HOST and HEED_PORT to a free address.",
        ) from error
    return sockets


def turn_away(listening: socket.socket) -> None:
    """From now on nobody begins to connect, while who has begun still gets in. Linux only; elsewhere it does nothing.

    Closing resets the connections that were made and not yet accepted, and there is always one more. So the kernel is
    told to drop what opens a connection (SYN without ACK); whoever sent it tries again, and finds the socket closed.
    """
    # of classic BPF, over a TCP header: flags & (SYN | ACK) == SYN ? drop : pass
    steps = [(0x30, 0, 0, 13), (0x54, 0, 0, 0x12), (0x15, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFF_FFFF)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox without it
            attached = struct.pack("HP", len(steps), ctypes.addressof(program))
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
