"""A communicator for TensorRT's own sums, by a stand-in for NCCL: it needs a GPU for each rank."""

from __future__ import annotations

import ctypes

import pytest
import torch

from pageflight.core.errors import ConfigError
from pageflight.lowering.nccl import join_ranks
from pageflight.models.stages import Place

from .thread_ranks import ThreadCommunicator, ThreadGroup


class Nccl:
    """Notes who asks to be which rank under which id."""

    def __init__(self, error: int = 0) -> None:
        self.joined: dict[int, tuple[int, bytes]] = {}

        def unique_id(id_at) -> int:
            ctypes.memmove(id_at, bytes(range(128)), 128)
            return error

        def init(handle_at, size: int, unique_id, rank: int) -> int:
            self.joined[rank] = size, bytes(unique_id)
            handle_at._obj.value = 0xABC0 + rank
            return 0

        def error_string(code: int) -> bytes:
            return f"error {code}".encode()

        self.ncclGetUniqueId, self.ncclCommInitRank, self.ncclGetErrorString = unique_id, init, error_string


def test_all_ranks_meet_under_the_id_of_the_first(monkeypatch):
    """Each waited for ever, under an id of its own."""
    library = Nccl()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    group = ThreadGroup(2)

    def join(rank: int):
        place = Place(rank=rank, tensor_parallel=2)
        return join_ranks(ThreadCommunicator(group, place), torch.device("cpu"))

    capsules = group.each(join, range(2))
    group.close()
    assert library.joined == {rank: (2, bytes(range(128))) for rank in range(2)}
    read = ctypes.pythonapi.PyCapsule_GetPointer
    read.restype, read.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    assert [read(capsule, b"ncclComm_t") for capsule in capsules] == [0xABC0, 0xABC1]


def test_without_nccl_or_with_its_refusal_the_reason_is_told(monkeypatch):
    """The bindings said that a capsule was null."""
    place = Place(rank=0, tensor_parallel=2)
    communicator = ThreadCommunicator(ThreadGroup(1), place)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nccl(error=5))
    with pytest.raises(ConfigError, match=r"ncclGetUniqueId of libnccl\.so\.2: error 5"):
        join_ranks(communicator, torch.device("cpu"))

    def missing(name: str):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(ConfigError, match=r"collectives='inside' needs libnccl\.so\.2, .*cannot open"):
        join_ranks(communicator, torch.device("cpu"))
