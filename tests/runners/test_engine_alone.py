from __future__ import annotations

import sys
from pathlib import Path

import pytest
from engines import load, make_checkpoint, make_engine

from pageflight.sched.scheduler import Scheduler

sys.path.insert(0, str(Path(__file__).parents[2]))

from perf.engine_alone import Load, measure, weights_of
from perf.workload import Workload


@pytest.mark.parametrize("item", ["uniq:3:7:20:5", "shared:4:6:64+9:4"])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_closed_loop_answers_every_request_in_full(tmp_path: Path, item: str, ahead: bool) -> None:
    """A request sent by the last one's end must not be lost when its step was planned ahead."""
    make_checkpoint(tmp_path / "checkpoint")
    engine, config = load(make_engine(tmp_path / "checkpoint", tmp_path / "engine", "openvino"))
    scheduler = Scheduler(config, engine.capacity.kv, vocab_size=engine.runner.limits.vocab_size)
    workload = Workload.parse(item)
    driver = Load(engine, scheduler, ahead=ahead)
    record = measure(driver, workload, seed=1)
    answers = driver.run(workload, seed=2)
    engine.runner.close()
    assert record["out_ok"] and record["in_ok"] and record["nreq"] == workload.num_requests
    assert [answer.num_output for answer in answers] == [workload.num_output] * workload.num_requests
    assert weights_of(engine.manifest).num_head_parameters == 199 * 64
    assert weights_of(engine.manifest).num_layer_parameters == 2 * (64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128)
