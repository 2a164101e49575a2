"""What a step costs does not depend on how many wait. Counted in bytecodes: the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from steady import Steady

from pageflight.core.tenants import Tenants, TenantShare


def bytecodes(work: Callable[[], None]) -> int:
    """How many bytecodes of this package's modules `work` runs."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Callable[..., object] | None:
        nonlocal count
        if "pageflight" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("num_tenants", [1, 10_000])
@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_ten_thousand_waiting_do_not_make_a_step_dearer(policy: str, num_tenants: int) -> None:
    """Steps in which sequences end, start and come, with tenants at their quotas, some of the waiting cancelled."""
    shares = Tenants(by_name={"tenant 1": TenantShare(max_running=1)})
    costs = {}
    for num_waiting in (200, 10_000):
        steady = Steady(
            scheduling_policy=policy, max_num_seqs=8, max_num_tokens=64, max_queue_size=20_000, tenants=shares
        )
        handles = [
            steady.submit(4, 3, tenant=f"tenant {number % num_tenants}", priority=number % 3)
            for number in range(num_waiting)
        ]
        for _ in range(10):
            steady.step()
        for handle in handles[100:140]:
            steady.scheduler.cancel(handle)

        def work(steady: Steady = steady) -> None:
            for number in range(12):
                steady.submit(4, 3, tenant=f"tenant {number}", priority=number % 3)
                steady.step()

        costs[num_waiting] = bytecodes(work)
        assert steady.scheduler.num_waiting > num_waiting - 120
    assert costs[200] > 1000
    assert costs[10_000] < 1.3 * costs[200], costs


def test_the_count_notices_a_walk_through_the_queue() -> None:
    """A check that cannot fail is none."""
    steady = Steady(max_num_seqs=1, max_queue_size=20_000)
    for _ in range(2000):
        steady.submit(4, 3)
    assert bytecodes(steady.scheduler.check) > 2000
