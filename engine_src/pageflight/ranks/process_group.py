"""torch.distributed between ranks: NCCL for GPUs and gloo for processors."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from pageflight.core.errors import ConfigError
from pageflight.models.stages import Place
from pageflight.ranks.network import interface_towards

TIMEOUT = timedelta(seconds=1800)
"""Of starting, where one rank may read its weights long after another. A step that hangs is its supervisor's affair."""
MAX_SENT = 256
"""Tensors that were sent and may not have been read yet: more than two steps have."""
_REACH_S = 10.0
_OWN_WATCHES = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_ENABLE_MONITORING")
"""Watches of torch's that abort the process where NCCL fails, as it does when a rank is lost, or where they hang. That
would be a crash of the core, its streams' fault: our lines and the supervisor's hang limit tell better."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def open_store(host: str) -> tuple[TCPStore, int]:
    """Where ranks find each other, and its port. The first rank keeps it, at its address `host` and no other."""
    with socket.socket() as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        store = TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=TIMEOUT, master_listen_fd=listener.detach()
        )
    return store, port


def reach_store(host: str, port: int) -> TCPStore:
    """The store that another process opened. Raises ConfigError where no port but the leader's can be reached."""
    try:
        socket.create_connection((host, port), timeout=_REACH_S).close()  # TCPStore would try for as long as `TIMEOUT`
    except OSError as error:
        raise ConfigError(
            f"{socket.gethostname()} cannot reach the first rank's port {port} at {host}: {error.strerror or error};"
            " ranks need all ports between their machines"
        ) from None
    return TCPStore(host, port, is_master=False, timeout=TIMEOUT)


@contextmanager
def _interface(name: str) -> Iterator[None]:
    """Have what is opened within the block use it, unless the environment names another. Processes that this one starts
    later choose for themselves: they may meet others, over another one."""
    chosen = [variable for variable in _INTERFACES if variable not in os.environ]
    os.environ.update(dict.fromkeys(chosen, name))
    try:
        yield
    finally:
        for variable in chosen:
            del os.environ[variable]


def _cores() -> str:
    """Tells processes that share processors from others: those of one kernel, and of one container."""
    container = os.stat("/proc/self/ns/cgroup").st_ino
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text(encoding='ascii').strip()} {container}"


class GroupCommunicator:
    """This process as one rank of the process group, of which it has one, and as one of the ranks of its stage."""

    def __init__(self, place: Place, store: Store, device: torch.device, host: str) -> None:
        """Meet the other ranks, by way of the interface that leads to `host`, the first one's; waits for them."""
        self.place, self._device = place, device
        os.environ.update(dict.fromkeys(_OWN_WATCHES, "0"))  # torchrun sets the first to 1
        with _interface(interface_towards(host)):
            self._meet(place, store, device)

    def _meet(self, place: Place, store: Store, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        store.set(f"cores of {place.rank}", _cores())
        dist.init_process_group(
            "nccl" if is_gpu else "gloo",
            store=store,
            rank=place.rank,
            world_size=place.num_ranks,
            timeout=TIMEOUT,
            device_id=device if is_gpu else None,
        )
        cores = [store.get(f"cores of {rank}") for rank in range(place.num_ranks)]
        self.num_here = cores.count(cores[place.rank])
        """Ranks that share this one's processors."""
        self._stage = self._passing = self._announcing = dist.group.WORLD
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()  # tensors that somebody may still read
        if place.pipeline_parallel > 1:
            # Every rank makes all groups. What goes to the next stage and what comes from the last one must not wait
            # for each other.
            size = place.tensor_parallel
            for stage in range(place.pipeline_parallel):
                group = dist.new_group(list(range(stage * size, (stage + 1) * size)))
                if stage == place.stage:
                    self._stage = group
            self._passing, self._announcing = dist.new_group(), dist.new_group()

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.numel():
            dist.all_reduce(x, group=self._stage)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty((self.place.tensor_parallel, *x.shape))
        if x.numel():
            dist.all_gather(list(gathered.unbind(0)), x, group=self._stage)
        return gathered

    def least(self, number: int) -> int:
        """The smallest of every rank's `number`."""
        return self._agreed(number, dist.ReduceOp.MIN)

    def total(self, number: int) -> int:
        """The sum of every rank's `number`."""
        return self._agreed(number, dist.ReduceOp.SUM)

    def _agreed(self, number: int, how: dist.ReduceOp.RedOpType) -> int:
        numbers = torch.tensor([number], device=self._device)
        dist.all_reduce(numbers, how)
        return int(numbers)

    def pass_on(self, x: Tensor) -> None:
        self._send(x, self.place.rank + self.place.tensor_parallel, self._passing)

    def take_over(self, x: Tensor) -> Tensor:
        dist.recv(x, self.place.rank - self.place.tensor_parallel, group=self._passing)
        return x

    def announce(self, results: Tensor) -> None:
        for rank in range(self.place.rank % self.place.tensor_parallel, self.place.rank, self.place.tensor_parallel):
            self._send(results, rank, self._announcing)

    def hear(self, results: Tensor) -> Tensor:
        self.expect(results)()
        return results

    def expect(self, results: Tensor) -> Callable[[], object]:
        last = self.place.num_ranks - self.place.tensor_parallel + self.place.shard.rank
        work = dist.irecv(results, last, group=self._announcing)
        assert work is not None, "both are of the group"
        return work.wait

    def _send(self, x: Tensor, rank: int, group: dist.ProcessGroup | None) -> None:
        """Without waiting for who receives; a few steps' tensors are kept for those that are behind."""
        work = dist.isend(x, rank, group=group)
        assert work is not None, "both are of the group"
        self._sent.append((work, x))
        while self._sent[0][0].is_completed() or len(self._sent) > MAX_SENT:
            self._sent.popleft()[0].wait()
            if not self._sent:
                break

    def close(self, *, is_whole: bool = True) -> None:
        """Leave the group, at about the time at which all do. Where one is gone NCCL would wait for it: its part ends
        with this process then."""
        if is_whole or self._device.type == "cpu":
            dist.destroy_process_group()
