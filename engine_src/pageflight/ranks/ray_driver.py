"""The Ray driver of a core: `python -m pageflight.ranks.ray_driver --line-fd N --parent-pid P`.

It joins the cluster for its core, has machines set aside, and an actor for each rank. A process of its own, because
Ray's client library brings threads, handlers of signals and of exceptions with it, and may end a process when it loses
its cluster: none of that is to befall a core. What it asked Ray for ends with it.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing.connection import Connection
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pageflight.core.errors import ConfigError, PageflightError, RanksMissing
from pageflight.core.parent import die_with
from pageflight.ranks.ray_actor import RankActor
from pageflight.ranks.ray_messages import (
    FromDriver,
    Kill,
    Machine,
    Over,
    Placed,
    Refused,
    Start,
    Waiting,
    Wanted,
    decode_to_driver,
    encode,
    shortage,
)

log = logging.getLogger("pageflight.ray")

NODE_ID = "ray.io/node-id"
"""The label by which Ray knows each of its nodes."""
_LOOK_S = 1.0
_MOST_WORDS = 400


class Cluster:
    """This process as a driver of a Ray cluster, and what that has set aside for it."""

    def __init__(self, wanted: Wanted, line: Connection) -> None:
        """Join, and wait for room. Raises RanksMissing, ConfigError."""
        self._wanted, self._line, self._sending = wanted, line, threading.Lock()
        self._actors: dict[int, Any] = {}
        deadline_s = time.monotonic() + wanted.wait_s
        self._here, self._address = self._join(deadline_s)
        # A bundle for each machine, all on different ones, and the first where this process is: so each has its ranks,
        # neighbours in number, whatever else the cluster does. A bundle for each rank would leave that to Ray.
        self._group = placement_group(
            [wanted.bundle] * wanted.num_nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=[{NODE_ID: self._here}, *[{}] * (wanted.num_nodes - 1)],
        )
        self._wait_room(deadline_s)

    def _join(self, deadline_s: float) -> tuple[str, str]:
        """Become a driver on this machine's node: its id and address."""
        address, told = self._wanted.address, ""
        while True:
            try:
                return _init(address)
            except (OSError, RuntimeError) as error:
                words = _short(error)
            if "version mismatch" in words.lower():  # of Ray, or of Python
                raise ConfigError(f"ray_address={address!r}: {words}")
            if time.monotonic() + _LOOK_S > deadline_s:
                raise RanksMissing(
                    f"no Ray cluster at ray_address={address!r} within rank_wait_s={self._wanted.wait_s:g}: {words}"
                )
            if words != told:
                self.send(Waiting(f"waiting for the Ray cluster at {address}: {words}"))
                told = words
            time.sleep(_LOOK_S)

    def _wait_room(self, deadline_s: float) -> None:
        told = ""
        while not self._group.wait(min(_LOOK_S, max(0.0, deadline_s - time.monotonic()))):
            words = shortage(self._wanted, self._address, self._machines())
            if time.monotonic() >= deadline_s:
                raise RanksMissing(f"no room for the ranks within rank_wait_s={self._wanted.wait_s:g}: {words}")
            if words != told:
                self.send(Waiting(f"waiting for room in the Ray cluster: {words}"))
                told = words

    def _machines(self) -> list[Machine]:
        free: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
        resource = self._wanted.resource
        return [
            Machine(
                node["NodeManagerAddress"],
                node["Resources"].get(resource, 0.0),
                free.get(node["NodeID"], {}).get(resource, 0.0),
            )
            for node in sorted(_nodes(), key=lambda node: (node["NodeID"] != self._here, node["NodeID"]))
            if node["Alive"]
        ]

    def placed(self) -> Placed:
        """Where the ranks will be. On GPUs it takes one for the first rank, which is no process of Ray's."""
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes()}
        nodes = placement_group_table(self._group)["bundles_to_node_id"]
        gpu = ray.get(self._actor(0).gpu.remote()) if self._wanted.resource == "GPU" else ""
        return Placed(tuple(addresses[nodes[index]] for index in range(self._wanted.num_nodes)), gpu)

    def start(self, ask: Start) -> None:
        """An actor for each rank. Its end is told by another thread."""
        ends = {self._actor(rank).run.remote(command, ask.environment): rank for rank, command in ask.commands.items()}
        threading.Thread(target=self._watch, args=(ends,), name="ray-ranks", daemon=True).start()

    def kill(self, rank: int) -> None:
        ray.kill(self._actors[rank])

    def send(self, message: FromDriver) -> None:
        with self._sending:
            self._line.send_bytes(encode(message))

    def close(self) -> None:
        """Give back what was set aside; the actors in it end."""
        remove_placement_group(self._group)

    def _actor(self, rank: int) -> Any:
        wanted = self._wanted
        amount = {"num_gpus": wanted.amount} if wanted.resource == "GPU" else {}
        actor = self._actors[rank] = (
            ray.remote(RankActor)
            .options(
                num_cpus=0 if amount else wanted.amount,
                **amount,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank // wanted.ranks_per_node),
            )
            .remote()
        )
        return actor

    def _watch(self, ends: dict[Any, int]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the core is gone
            while ends:
                for end in ray.wait(list(ends))[0]:
                    self.send(_over(ends.pop(end), end))


def _init(address: str) -> tuple[str, str]:
    """Id and address of this machine's node. Raises OSError or RuntimeError where there is none, or no cluster."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=_LOOK_S).close()  # Ray itself would try for minutes
    here = None
    while True:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            namespace="pageflight",
            _node_ip_address=here,
        )
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what befalls actors is told by us, once
        node_id: str = ray.get_runtime_context().get_node_id()
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in _nodes() if node["Alive"]}
        nearest = addresses.get(node_id)
        if nearest is not None and _is_own(nearest):
            return node_id, nearest
        # It takes any node whose process it sees; containers may show those of others.
        ray.shutdown()
        own = next(filter(_is_own, addresses.values()), None)
        if own is None or here is not None:
            raise ConnectionError(f"no Ray node runs on this machine, the nearest is {nearest}")
        here = own


def _is_own(address: str) -> bool:
    """Whether this machine, or its container, has the address."""
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return False
    return True


def _nodes() -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _over(rank: int, end: Any) -> Over:
    """What became of an actor's call to `run`."""
    try:
        code: int = ray.get(end)
    except RayTaskError as error:
        return Over(rank, f"its actor failed: {_short(error.cause)}", 1)
    except RayActorError as error:
        if error.actor_init_failed:  # its last line is the error that its machine had
            return Over(rank, f"no actor of ours can run there: {str(error).splitlines()[-1]}", 1)
        return Over(rank, f"Ray says: {_short(error)}", -signal.SIGKILL)  # it was killed, or its machine is gone
    except RayError as error:
        return Over(rank, f"Ray says: {_short(error)}", 1)
    return Over(rank, f"signal {-code}" if code < 0 else f"exit status {code}", code)


def _short(error: BaseException) -> str:
    """What Ray says, without the numbers of its actors."""
    lines = [line for line in str(error).splitlines() if line.strip() and not line.startswith("\t")]
    words = " ".join(lines[1:] if isinstance(error, ActorDiedError) and len(lines) > 1 else lines)
    return words if len(words) <= _MOST_WORDS else f"{words[:_MOST_WORDS]}…"


def main() -> int:
    parser = argparse.ArgumentParser(prog="pageflight.ranks.ray_driver", description=__doc__)
    parser.add_argument("--line-fd", type=int, required=True, help="socket to the core")
    parser.add_argument("--parent-pid", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    die_with(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # What Ray prints of its nodes and actors goes nowhere: what concerns the core is told in its log.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return _serve(Connection(arguments.line_fd))


def _serve(line: Connection) -> int:
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the core has enough
        wanted = decode_to_driver(line.recv_bytes())
        assert isinstance(wanted, Wanted)
        try:
            cluster = Cluster(wanted, line)
            for number in (signal.SIGTERM, signal.SIGINT):  # the core decides; Ray has set handlers of its own
                signal.signal(number, signal.SIG_IGN)
            cluster.send(cluster.placed())
        except PageflightError as error:
            line.send_bytes(encode(Refused(type(error).__name__, str(error))))
            return 1
        except Exception:
            log.exception("the Ray driver ends")
            return 1
        _obey(cluster, line)
    return 0


def _obey(cluster: Cluster, line: Connection) -> None:
    try:
        while True:
            message = decode_to_driver(line.recv_bytes())
            if isinstance(message, Start):
                cluster.start(message)
            elif isinstance(message, Kill):
                cluster.kill(message.rank)
    finally:
        cluster.close()


if __name__ == "__main__":
    sys.exit(main())
