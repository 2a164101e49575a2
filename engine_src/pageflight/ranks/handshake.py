"""How a rank that dials in and the leader learn that both have the key: HMAC-SHA256 of fresh random numbers, both ways.

Three messages of msgpack, framed as `multiprocessing.connection` frames bytes, so that the line goes on as one of its
connections. The leader asks (`Challenge`), the rank says who it is (`Hello`), the leader takes it or not (`Answer`).
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from multiprocessing.connection import Connection
from typing import TypeVar

import msgspec

LIMIT_S = 5.0
"""For all of it."""
MOST_BYTES = 1024
_MAGIC = "pageflight ranks"
_NONCE_BYTES = 32


class Challenge(msgspec.Struct, array_like=True, frozen=True):
    """The leader's."""

    magic: str
    nonce: bytes


class Hello(msgspec.Struct, array_like=True, frozen=True):
    """The rank's: which it is, on which machine, of which pageflight."""

    rank: int
    host: str
    version: str
    nonce: bytes
    mac: bytes


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """The leader's: why not, if it does not; `is_final` where it never will. Counts for nothing without its `mac`."""

    mac: bytes
    refused: str = ""
    is_final: bool = False


class RankRefused(Exception):
    """The leader does not take this rank; `is_final`: nor will it later."""

    def __init__(self, reason: str, *, is_final: bool) -> None:
        self.is_final = is_final
        super().__init__(reason)


class NotARank(Exception):
    """Who is at the other end says nothing, or nonsense, or has not the key."""


Message = TypeVar("Message", Challenge, Hello, Answer)


class Caller:
    """Who has dialled in, has the key, and waits for an answer."""

    def __init__(self, peer: socket.socket, key: bytes) -> None:
        """The leader's side. Raises NotARank, OSError."""
        deadline_s = time.monotonic() + LIMIT_S
        self._peer, self._key, self._nonce = peer, key, secrets.token_bytes(_NONCE_BYTES)
        _send(peer, Challenge(_MAGIC, self._nonce))
        self.hello = hello = _receive(peer, Hello, deadline_s)
        has_key = hmac.compare_digest(hello.mac, _mac_of_rank(key, self._nonce, hello))
        if len(hello.nonce) != _NONCE_BYTES or not has_key:
            _send(peer, Answer(b"", "it has another key"))
            raise NotARank("it has another key")

    def answer(self, refused: str = "", *, is_final: bool = False) -> None:
        """Take it, or say why not. Raises OSError."""
        mac = _mac_of_leader(self._key, self._nonce, self.hello, refused, is_final)
        _send(self._peer, Answer(mac, refused, is_final))
        self._peer.settimeout(None)


def join(peer: socket.socket, key: bytes, *, rank: int, host: str, version: str) -> Connection:
    """The rank's side: the line. Raises RankRefused where one that has the key says so, NotARank, OSError."""
    deadline_s = time.monotonic() + LIMIT_S
    challenge = _receive(peer, Challenge, deadline_s)
    if challenge.magic != _MAGIC or len(challenge.nonce) != _NONCE_BYTES:
        raise NotARank("it is no leader")
    hello = Hello(rank, host, version, secrets.token_bytes(_NONCE_BYTES), b"")
    hello = msgspec.structs.replace(hello, mac=_mac_of_rank(key, challenge.nonce, hello))
    _send(peer, hello)
    answer = _receive(peer, Answer, deadline_s)
    if not hmac.compare_digest(
        answer.mac, _mac_of_leader(key, challenge.nonce, hello, answer.refused, answer.is_final)
    ):
        raise NotARank("the leader has another key")  # or is somebody else: whoever answers can say so
    if answer.refused:
        raise RankRefused(answer.refused, is_final=answer.is_final)
    peer.settimeout(None)
    return Connection(peer.detach())


def _mac_of_rank(key: bytes, nonce: bytes, hello: Hello) -> bytes:
    said = msgspec.msgpack.encode([hello.rank, hello.host, hello.version])
    return hmac.digest(key, b"rank" + nonce + hello.nonce + said, "sha256")


def _mac_of_leader(key: bytes, nonce: bytes, hello: Hello, refused: str, is_final: bool) -> bytes:
    said = msgspec.msgpack.encode([refused, is_final])
    return hmac.digest(key, b"leader" + nonce + hello.nonce + said, "sha256")


def _send(peer: socket.socket, message: msgspec.Struct) -> None:
    data = msgspec.msgpack.encode(message)
    peer.settimeout(LIMIT_S)
    peer.sendall(struct.pack("!i", len(data)) + data)


def _receive(peer: socket.socket, kind: type[Message], deadline_s: float) -> Message:
    (size,) = struct.unpack("!i", _read(peer, 4, deadline_s))
    if not 0 < size <= MOST_BYTES:
        raise NotARank("it speaks another language")
    try:
        return msgspec.msgpack.decode(_read(peer, size, deadline_s), type=kind)
    except msgspec.MsgspecError:
        raise NotARank("it speaks another language") from None


def _read(peer: socket.socket, size: int, deadline_s: float) -> bytes:
    """Exactly so many bytes, however slowly they come, but not for ever."""
    data = b""
    while len(data) < size:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise NotARank(f"it said nothing for {LIMIT_S:g} s")
        peer.settimeout(left_s)
        try:
            chunk = peer.recv(size - len(data))
        except TimeoutError:
            continue
        if not chunk:
            raise NotARank("it closed the line")
        data += chunk
    return data
