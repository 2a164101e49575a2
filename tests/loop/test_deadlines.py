"""What a front knows of the deadlines of its requests."""

from __future__ import annotations

from pageflight.loop.deadlines import Deadlines


def test_deadlines_expire_in_order_and_only_for_what_is_open() -> None:
    open_ids = {1, 2, 3}
    deadlines = Deadlines(open_ids.__contains__)
    for generation_id, deadline_s in ((1, 30.0), (2, 10.0), (3, 20.0)):
        deadlines.add(deadline_s, generation_id)
    assert not deadlines.has_expired(9.9) and deadlines.pop_expired(9.9) == []
    open_ids.remove(3)
    assert deadlines.has_expired(30.0) and deadlines.pop_expired(30.0) == [2, 1]
    assert not deadlines.has_expired(1e9)


def test_deadlines_of_requests_that_ended_do_not_pile_up() -> None:
    """Each of ten thousand short requests with a deadline in an hour stayed for that hour."""
    deadlines = Deadlines(lambda generation_id: generation_id >= 9_990)
    for generation_id in range(10_000):
        deadlines.add(3600.0, generation_id)
    assert len(deadlines._heap) < 300
    assert deadlines.pop_expired(3600.0) == list(range(9_990, 10_000))
