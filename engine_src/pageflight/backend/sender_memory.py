"""Whom a response sender of Triton's Python backend answers, read from its memory.

Triton gives a request's sender to the process that executes it and no other way to end the request. In memory a sender
is the two addresses by which tritonserver knows whom to answer, and a few flags (`src/response_sender.h` of the Python
backend, the same from release 24.10 to this day, x86-64):

    0 request · 8 response factory · 16 decoupled? · 24 names · 72 pool · 80 cancellation · 96 mutex
    136 closed? · 144 responses sent · 152 factory deleted?

tritonserver takes the addresses from a message as they are, whichever of its stubs has sent it. So a sender that is
lent the addresses of another's request ends that one. What is read or written here is checked against that layout and
against tritonserver's memory map first.
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pageflight.backend.triton import Sender

Words = tuple[int, int]

_TYPE = "InferenceResponseSender"
_OBJECT = 16  # of pybind11's instance, where it keeps the address of the C++ object
_WORDS = struct.Struct("=QQ")
_MUTEX, _CLOSED, _SENT, _DELETED = slice(96, 136), 136, slice(144, 152), 152
_SIZE = 153
_MAPPED = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw.p ", re.MULTILINE)


def words_of(sender: Sender) -> Words | None:
    """The addresses of the request and of its response factory; None for a sender that is not Triton's."""
    if type(sender).__name__ != _TYPE:
        return None
    request, factory = _WORDS.unpack(ctypes.string_at(_address_of(sender), _WORDS.size))
    return request, factory


class ServerMemory:
    """Where tritonserver has its heap; what points elsewhere is no request of it."""

    def __init__(self, server_pid: int) -> None:
        text = Path(f"/proc/{server_pid}/maps").read_text(encoding="utf-8", errors="replace")
        self._ranges = [(int(start, 16), int(end, 16)) for start, end in _MAPPED.findall(text)]

    def holds(self, words: Words) -> bool:
        return all(word % 8 == 0 and any(start <= word < end for start, end in self._ranges) for word in words)


def is_known(sender: Sender, memory: ServerMemory) -> bool:
    """Whether a sender that has not sent yet looks as this module expects."""
    words = words_of(sender)
    if words is None or not memory.holds(words):
        return False
    data = ctypes.string_at(_address_of(sender), _SIZE)
    return not any(data[_MUTEX]) and not data[_CLOSED] and not any(data[_SENT]) and not data[_DELETED]


@contextmanager
def lent(sender: Sender, words: Words) -> Iterator[None]:
    """`sender` answers the request of `words` instead of its own, as if it had not sent anything, until the block ends.

    No other thread may use it meanwhile. Only for a sender that `is_known`.
    """
    address = _address_of(sender)
    own = ctypes.string_at(address, _SIZE)
    ctypes.memmove(address, _WORDS.pack(*words), _WORDS.size)
    try:
        yield
    finally:
        ctypes.memmove(address, own, _SIZE)


def _address_of(sender: Sender) -> int:
    value = ctypes.c_void_p.from_address(id(sender) + _OBJECT).value
    assert value is not None
    return value
