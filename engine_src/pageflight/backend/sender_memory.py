"""Whom a response sender of Triton's Python backend answers, read from its memory.

Triton gives a request's sender to the process that executes it and no other way to end the request. In memory a sender
is the two addresses by which tritonserver knows whom to answer, and a few flags (`src/response_sender.h` of the Python
backend, the same from release 24.10 to this day, x86-64):

    0 request · 8 response factory · 16 decoupled? · 24 names · 72 pool · 80 cancellation · 96 mutex
    136 closed? · 144 responses sent · 152 factory deleted?

tritonserver takes the addresses from a message as they are, whichever of its stubs has sent it. So a sender that is
lent the addresses of another's request ends that one. Nothing is written before a sender has shown that this is its
layout: with its own only and final response exactly the flags above must have changed, each in its place. (Zeros alone
prove nothing: where the mutex is larger, as on aarch64, they are there as well.) Addresses are checked against
tritonserver's memory map.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pageflight.backend.triton import Sender

Words = tuple[int, int]

_TYPE = "InferenceResponseSender"
_MACHINE, _FIRST_VERSION = "x86_64", (2, 51)
_OBJECT = 16  # of pybind11's instance, where it keeps the address of the C++ object
_WORDS = struct.Struct("=QQ")
_MUTEX, _CLOSED, _SENT, _DELETED = slice(96, 136), slice(136, 137), slice(144, 152), slice(152, 153)
_STATE = (_MUTEX, _CLOSED, _SENT, _DELETED)  # all zero in a sender that has not sent; what lies between is undefined
_SIZE = 153
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw.p ", re.MULTILINE)


@functools.cache
def is_known_server() -> bool:
    """Whether machine and server may have this layout. NVIDIA's containers tell the server's version, wheels do not."""
    version = re.match(r"(\d+)\.(\d+)", os.environ.get("TRITON_SERVER_VERSION", ""))
    is_old = version is not None and (int(version[1]), int(version[2])) < _FIRST_VERSION
    return platform.machine() == _MACHINE and not is_old


def words_of(sender: Sender) -> Words | None:
    """The addresses of the request and of its response factory; None for a sender that is not known."""
    image = image_of(sender, _WORDS.size)
    if image is None:
        return None
    request, factory = _WORDS.unpack(image)
    return request, factory


def image_of(sender: Sender, size: int = _SIZE) -> bytes | None:
    """Its memory as it is now; None for a sender that is not Triton's or not of a known server."""
    if type(sender).__name__ != _TYPE or not is_known_server():
        return None
    return ctypes.string_at(_address_of(sender), size)


class ServerMemory:
    """Where tritonserver has its heap; what points elsewhere is no request of it."""

    def __init__(self, server_pid: int) -> None:
        text = Path(f"/proc/{server_pid}/maps").read_text(encoding="utf-8", errors="replace")
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in _MAPPED.findall(text)]

    def holds(self, words: Words) -> bool:
        return all(word % 8 == 0 and any(start <= word < end for start, end in self._ranges) for word in words)


def is_fresh(image: bytes, memory: ServerMemory) -> bool:
    """Whether this may be a sender that has not sent yet."""
    request, factory = _WORDS.unpack_from(image)
    return memory.holds((request, factory)) and not any(any(image[part]) for part in _STATE)


def has_ended_once(before: bytes, after: bytes | None) -> bool:
    """Whether a fresh sender looks, after its only and final response, as it must in this module's layout."""
    if after is None or after[_DELETED] not in (b"\0", b"\1"):
        return False
    expected = bytearray(before)
    expected[_CLOSED], expected[_SENT], expected[_DELETED] = b"\1", struct.pack("=Q", 1), after[_DELETED]
    return after == expected


@contextmanager
def lent(sender: Sender, words: Words) -> Iterator[None]:
    """`sender` answers the request of `words` instead of its own, as if it had not sent anything, until the block ends.

    No other thread may use it meanwhile. Only for a sender that `has_ended_once`.
    """
    address = _address_of(sender)
    own = ctypes.string_at(address, _SIZE)
    fresh = bytearray(own)
    fresh[: _WORDS.size] = _WORDS.pack(*words)
    for part in _STATE:
        fresh[part] = bytes(part.stop - part.start)
    ctypes.memmove(address, bytes(fresh), _SIZE)
    try:
        yield
    finally:
        ctypes.memmove(address, own, _SIZE)


def _address_of(sender: Sender) -> int:
    value = ctypes.c_void_p.from_address(id(sender) + _OBJECT).value
    assert value is not None
    return value
