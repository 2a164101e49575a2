"""Ranks that are processes of this machine: torch.distributed between them, NCCL for GPUs and gloo for processors."""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from pageflight.models.sharding import Shard

HOST = "127.0.0.1"
TIMEOUT = timedelta(seconds=1800)
"""Of starting, where one rank may read its weights long after another. A step that hangs is its supervisor's affair."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def open_store() -> tuple[TCPStore, int]:
    """Where ranks of this machine find each other, and its port. The first rank keeps it; nobody outside reaches it."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        port = listener.getsockname()[1]
        store = TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT, master_listen_fd=listener.detach()
        )
    return store, port


def reach_store(port: int) -> TCPStore:
    """The store that another process opened."""
    return TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)


class GroupCommunicator:
    """This process as one rank of the process group, of which it has one."""

    def __init__(self, shard: Shard, store: Store, device: torch.device) -> None:
        """Meet the other ranks; waits for them."""
        self.shard, self._device = shard, device
        for name in _INTERFACES:
            os.environ.setdefault(name, "lo")
        is_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=store,
            rank=shard.rank,
            world_size=shard.size,
            timeout=TIMEOUT,
            device_id=device if is_gpu else None,
        )

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.shard.size, *x.shape))
        if x.numel():
            dist.all_gather(list(gathered.unbind(0)), x)
        return gathered

    def least(self, number: int) -> int:
        """The smallest of every rank's `number`."""
        return int(self.all_gather(torch.tensor([number], device=self._device)).min())

    def close(self, *, is_whole: bool = True) -> None:
        """Leave the group, at about the time at which all do. Where one is gone NCCL would wait for it: its part ends
        with this process then."""
        if is_whole or self._device.type == "cpu":
            dist.destroy_process_group()
