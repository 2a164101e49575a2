"""Runs one machine for so many examples, or all of them for so long: `scripts/fuzz`."""

from __future__ import annotations

import argparse
import logging
import random
import sys
import time

from cache_machine import CacheMachine
from counted import STEPS, Counted
from front_machine import FrontMachine
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from loop_machine import LoopMachine
from pool_machine import PoolMachine
from recorded_scheduler_machine import RecordedSchedulerMachine

MACHINES: dict[str, type[Counted]] = {
    "pool": PoolMachine,
    "cache": CacheMachine,
    "scheduler": RecordedSchedulerMachine,
    "loop": LoopMachine,
    "front": FrontMachine,
}
STEPS_OF_AN_EXAMPLE = 50


def run(name: str, *, num_examples: int, chosen_seed: int | None = None) -> int:
    """Run a machine; how many steps it made. Raises what its smallest failing example raises.

    Without a seed the same examples come every time.
    """
    machine = MACHINES[name]
    before = STEPS[machine.__name__]
    chosen = settings(
        max_examples=num_examples,
        stateful_step_count=STEPS_OF_AN_EXAMPLE,
        deadline=None,
        database=None,
        derandomize=chosen_seed is None,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )

    seeded = type(machine.__name__, (machine,), {})
    if chosen_seed is not None:
        seed(chosen_seed)(seeded)
    run_state_machine_as_test(seeded, settings=chosen)
    return STEPS[machine.__name__] - before


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, for all machines together")
    parser.add_argument("--seed", type=int, help="begin with this seed, as a failure names it; otherwise a random one")
    parser.add_argument("--machine", choices=sorted(MACHINES), help="this one only")
    parser.add_argument("--examples", type=int, default=100, help="examples of each seed")
    arguments = parser.parse_args()
    names = [arguments.machine] if arguments.machine else list(MACHINES)
    next_seed = random.randrange(1 << 32) if arguments.seed is None else arguments.seed
    until_s = time.monotonic() + 60 * arguments.minutes
    num_rounds = 0
    while num_rounds == 0 or time.monotonic() < until_s:
        for name in names:
            try:
                run(name, num_examples=arguments.examples, chosen_seed=next_seed)
            except Exception:
                print(
                    f"\nAgain: scripts/fuzz --machine {name} --seed {next_seed} --examples {arguments.examples}"
                    " --minutes 0",
                    file=sys.stderr,
                )
                raise
            if num_rounds and time.monotonic() >= until_s:
                break
        num_rounds += 1
        next_seed += 1
        shown = ", ".join(f"{name} {STEPS[MACHINES[name].__name__]}" for name in names)
        print(f"\r{num_rounds} rounds without a failure; steps: {shown}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # cores die all the time here; not in main(), which tests call in their process
    sys.exit(main())
