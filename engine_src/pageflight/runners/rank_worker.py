"""A rank's process: `python -m pageflight.runners.rank_worker`, beside its core or wherever its machine is.

The first message says what to load, each further one is a plan, and the line's end is the end. It computes what the
first rank computes, or another stage, and says of each step what ids came of it: a digest.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from pageflight.core.errors import ConfigError
from pageflight.core.parent import die_with
from pageflight.ranks.dialing import ENDED, FAILED, NO_LEADER, REFUSED, NoLeader, dial, end_with, parse_leader
from pageflight.ranks.handshake import RankRefused
from pageflight.ranks.key import rank_key
from pageflight.ranks.messages import Computed, Failed, Present, decode_spec, digest_of, encode
from pageflight.ranks.plan_frames import PlanDecoder
from pageflight.runners.base import BusyRunner, Runner
from pageflight.runners.engine_copies import own_copy

log = logging.getLogger("pageflight.rank")


def serve(runner: Runner, line: Connection) -> None:
    """Run plans as they come until the line ends; at most `max_in_flight` at once, and none waits for the next."""
    plans, num_in_flight = PlanDecoder(), 0
    while True:
        while num_in_flight == runner.limits.max_in_flight or (num_in_flight and not line.poll()):
            result = runner.collect()
            num_in_flight -= 1
            busy_s = runner.busy_s if isinstance(runner, BusyRunner) else 0.0
            line.send_bytes(encode(Computed(result.step, digest_of(result), busy_s)))
        runner.submit(plans.plan(line.recv_bytes()))
        num_in_flight += 1


def work(line: Connection, device_index: int, engine_dir: Path | None = None, *, verifies: bool = False) -> int:
    """Be the rank that the first message says until the line ends. `engine_dir`: where this machine has engines, if not
    where the first rank has its own; `verifies`: it hashes their files, for all ranks of the machine. The exit
    status."""
    try:
        try:
            spec = decode_spec(line.recv_bytes())
            spec = own_copy(spec, engine_dir)
            from pageflight.runners.parallel import join  # brings torch and the lowering

            runner, communicator = join(
                spec, device_index, lambda: line.send_bytes(encode(Present())), verifies=verifies
            )
            gc.collect()
            gc.freeze()  # what start-up made lives as long as the process, and others wait while it is walked through
            try:
                serve(runner, line)
            except (EOFError, ConnectionError):  # the latter where the first rank has not read all that was said
                runner.close()
                communicator.close()
        except (EOFError, BrokenPipeError, ConnectionError, TimeoutError):
            raise
        except Exception as error:
            log.error("the rank ends: %s: %s", type(error).__name__, error)
            line.send_bytes(encode(Failed(type(error).__name__, str(error))))
            return FAILED
    except (EOFError, ConnectionError, TimeoutError):  # the first rank closes, or its machine is gone
        log.info("the line has ended")
    return ENDED


def main() -> int:
    parser = argparse.ArgumentParser(prog="pageflight.runners.rank_worker", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--line-fd", type=int, help="socket to the first rank")
    where.add_argument("--connect", help="HOST:PORT of the leader; the key is in PAGEFLIGHT_RANK_KEY")
    parser.add_argument("--rank", type=int, help="which rank dials in")
    parser.add_argument("--wait-s", type=float, default=0.0, help="seconds that the leader is tried for")
    parser.add_argument("--parent-pid", type=int, default=0, help="process to die with; 0: nobody")
    parser.add_argument("--device-index", type=int, default=0, help="GPU, of those that this process sees")
    parser.add_argument("--engine-dir", type=Path, help="engine directory, or repository, of this machine")
    parser.add_argument("--verify", action="store_true", help="hash the engine's files while they are loaded")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # its core, or who has it join, decides
        signal.signal(number, signal.SIG_IGN)
    die_with(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    if arguments.connect is None:
        return work(Connection(arguments.line_fd), arguments.device_index, arguments.engine_dir)
    if arguments.rank is None:
        parser.error("--connect needs --rank")
    try:
        leader = parse_leader(arguments.connect, 0)
        line = dial(leader, arguments.rank, rank_key(), wait_s=arguments.wait_s)
    except (ConfigError, RankRefused) as error:
        log.error("rank %d: %s", arguments.rank, error)
        return REFUSED
    except NoLeader as error:
        log.error("rank %d: %s", arguments.rank, error)
        return NO_LEADER
    end_with(line)
    return work(line, arguments.device_index, arguments.engine_dir, verifies=arguments.verify)


if __name__ == "__main__":
    sys.exit(main())
