"""State machines against their models: ten thousand steps of them, in each run of the tests."""

from __future__ import annotations

from dataclasses import fields

import pytest
from run_machines import MACHINES, main, run
from scheduler_machine import RESOLVED, SETTINGS

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.kv.block_pool import BlockPool

LEAST_STEPS = {"pool": 2000, "cache": 2000, "scheduler": 2500, "loop": 2000, "front": 2000}
EXAMPLES = {name: least // 30 for name, least in LEAST_STEPS.items()}
"""An example may end before its last step."""


def test_the_machines_together_make_ten_thousand_steps() -> None:
    assert LEAST_STEPS.keys() == MACHINES.keys() and sum(LEAST_STEPS.values()) >= 10_000


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.timeout(300)
def test_any_order_of_steps_keeps_every_promise(name: str) -> None:
    """What breaks is shown as the shortest order of steps that breaks it; scripts/fuzz goes on for longer."""
    assert run(name, num_examples=EXAMPLES[name]) >= LEAST_STEPS[name]


def test_every_setting_of_the_scheduler_is_drawn() -> None:
    """A setting that no machine knows is tested by its author alone."""
    known = {item.name for item in (*fields(SchedulerConfig), *fields(KVConfig))}
    assert known == SETTINGS.keys() | RESOLVED


def test_what_breaks_is_shrunk_and_told_with_the_way_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure after an hour that nobody could repeat."""
    monkeypatch.setattr(BlockPool, "release", lambda pool, blocks: None)
    monkeypatch.setattr("sys.argv", ["fuzz", "--machine", "pool", "--seed", "7", "--minutes", "0"])
    with pytest.raises(AssertionError) as failure:
        main()
    assert "Again: scripts/fuzz --machine pool --seed 7 --examples 100 --minutes 0" in capsys.readouterr().err
    rules = ("state.allocate", "state.keep", "state.release", "state.share")
    steps = [line for line in failure.value.__notes__ if line.startswith(rules)]
    assert 2 <= len(steps) <= 3, steps
