"""A communicator of NCCL's own, for what calls NCCL itself: TensorRT's layers that sum over ranks.

torch keeps its communicators to itself. This one is made of the same library, which torch has loaded, and ends with the
process: to leave one that has lost a rank would wait for that rank.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from pageflight.core.errors import ConfigError
from pageflight.lowering.communicator import Communicator

_LIBRARY = "libnccl.so.2"
_ID_BYTES = 128
_CAPSULE_NAME = b"ncclComm_t"  # a capsule keeps the pointer to its name: it must live as long


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


def join_ranks(communicator: Communicator, device: torch.device) -> Any:
    """The `ncclComm_t` of a stage's ranks, each on its own GPU, in a capsule. All of them call it.

    Raises ConfigError where NCCL is not here or refuses; the others may then wait for as long as NCCL does.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise ConfigError(f"collectives='inside' needs {_LIBRARY}, which cannot be loaded: {error}") from None
    shard, unique_id = communicator.place.shard, _UniqueId()
    if shard.rank == 0:
        _check(library, "ncclGetUniqueId", ctypes.byref(unique_id))
    own = torch.frombuffer(bytearray(bytes(unique_id)), dtype=torch.uint8).to(device)
    chosen = _UniqueId.from_buffer_copy(communicator.all_gather(own)[0].cpu().numpy().tobytes())
    handle = ctypes.c_void_p()
    library.ncclCommInitRank.argtypes = (ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int)
    _check(library, "ncclCommInitRank", ctypes.byref(handle), shard.size, chosen, shard.rank)
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(handle, _CAPSULE_NAME, None)


def _check(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        library.ncclGetErrorString.restype = ctypes.c_char_p
        raise ConfigError(f"{name} of {_LIBRARY}: {library.ncclGetErrorString(code).decode()}")
