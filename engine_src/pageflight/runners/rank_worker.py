"""A rank's process: `python -m pageflight.runners.rank_worker --line-fd N --parent-pid P`.

The first message says what to load, each further one is a plan, and the line's end is the end. It computes what the
first rank computes, or another stage, and says of each step what ids came of it: a digest.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from pageflight.core.parent import die_with
from pageflight.ranks.messages import Computed, Failed, Present, decode_spec, digest_of, encode
from pageflight.ranks.plan_frames import PlanDecoder
from pageflight.runners.base import BusyRunner, Runner

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="pageflight.runners.rank_worker", description=__doc__)
    parser.add_argument("--line-fd", type=int, required=True, help="socket to the first rank")
    parser.add_argument("--parent-pid", type=int, required=True, help="process to die with")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):  # its core decides
        signal.signal(number, signal.SIG_IGN)
    die_with(arguments.parent_pid)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    line = Connection(arguments.line_fd)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the first rank closes
        try:
            spec = decode_spec(line.recv_bytes())
            from pageflight.runners.parallel import join  # brings torch and the lowering

            line.send_bytes(encode(Present()))
            runner, communicator = join(spec)
            gc.collect()
            gc.freeze()  # what start-up made lives as long as the process, and others wait while it is walked through
            with suppress(EOFError):
                serve(runner, line)
            runner.close()
            communicator.close()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            log.error("the rank ends: %s: %s", type(error).__name__, error)
            line.send_bytes(encode(Failed(type(error).__name__, str(error))))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
