import pytest
from perf.workload import DEFAULT_PLAN, WARM_UP_PLAN, Kind, Workload


def test_a_workload_is_written_as_it_is_read() -> None:
    """Sides of a comparison in other environments get workloads as text."""
    for item in (*DEFAULT_PLAN, *WARM_UP_PLAN):
        assert str(Workload.parse(item)) == item


@pytest.mark.parametrize(
    "item", ["uniq:1:8:128", "uniq:1:8:128+4:64", "shared:1:8:128:64", "odd:1:8:1:1", "uniq:0:1:1:1"]
)
def test_a_malformed_item_is_refused_with_the_expected_form(item: str) -> None:
    """`uniq:8:32:512+32:32` was measured as if nothing were shared, without a word."""
    with pytest.raises(ValueError, match="uniq:8:32:128:64"):
        Workload.parse(item)


def test_shared_prompts_begin_alike_and_unique_ones_do_not() -> None:
    """A prefix cache would make `uniq` figures meaningless if prompts repeated."""
    shared = Workload.parse("shared:2:16:32+8:4").prompts(1000, seed=5)
    assert len({tuple(prompt[:32]) for prompt in shared}) == 1
    assert len({tuple(prompt[32:]) for prompt in shared}) == 16
    unique = Workload.parse("uniq:2:16:40:4").prompts(1000, seed=5)
    assert len({tuple(prompt[:4]) for prompt in unique}) == 16
    assert all(len(prompt) == 40 and min(prompt) >= 2 and max(prompt) < 1000 for prompt in shared + unique)


def test_prompts_depend_on_the_seed_alone() -> None:
    """Both sides of a comparison must be asked the same; two turns must not be."""
    workload = Workload(kind=Kind.uniq, concurrency=1, num_requests=3, num_shared=0, num_own=9, num_output=1)
    assert workload.prompts(500, seed=1) == workload.prompts(500, seed=1)
    assert workload.prompts(500, seed=1) != workload.prompts(500, seed=2)
