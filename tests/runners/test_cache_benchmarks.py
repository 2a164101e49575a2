"""What perf/ measures of the cache and of survival, on a small engine: counts, not times."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from engines import VOCAB, make_checkpoint, make_engine

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.runners.factory import load_engine

sys.path.insert(0, str(Path(__file__).parents[2]))  # `perf` is not installed

from perf.workload import Workload

from perf import cache_pressure, prefix_cache, survival


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    make_checkpoint(folder / "checkpoint")
    return make_engine(folder / "checkpoint", folder / "engine", "openvino", dtype="bf16")


@pytest.mark.parametrize("side", prefix_cache.SIDES)
def test_all_that_can_be_found_of_a_common_prefix_is_found(engine_dir: Path, side: str) -> None:
    """The ceiling that is printed beside the hit rate would else be one that nothing reaches."""
    workload = Workload.parse("shared:4:4:64+9:4")
    config = SchedulerConfig(max_num_seqs=4, max_model_len=80)
    kv = KVConfig(num_blocks=12, host_memory_bytes=1 << 22)
    engine = load_engine(engine_dir, EngineConfig(kv=kv, scheduler=config, num_threads=2))
    drive = prefix_cache.side_of(engine, side, 12, engine.runner.limits.num_host_blocks, config)
    waves = prefix_cache.measure(drive, workload, num_blocks=12, block_size=32, vocab_size=VOCAB, seed=1)
    engine.runner.close()
    turn = dict.fromkeys(prefix_cache.SIDES, waves)
    cold, warm, back = [line for line in prefix_cache.records([turn], workload, 32) if line["side"] == side]
    if side == "off":
        assert cold["hit_rate"] == warm["hit_rate"] == back["hit_rate"] == 0
        return
    assert cold["hit_rate"] == cold["hit_rate_ceiling"] and warm["hit_rate"] == warm["hit_rate_ceiling"]
    assert back["from_host"] == (64 if side == "host" else 0)
    assert (back["hit_rate"] == back["hit_rate_ceiling"]) is (side == "host")


@pytest.mark.parametrize("deterministic", [False, True])
def test_replayed_answers_are_compared_from_their_cut_on(engine_dir: Path, deterministic: bool) -> None:
    engine = survival.Engine(engine_dir, num_rows=4, max_len=144, deterministic=deterministic, num_threads=2)
    rng = random.Random(1)
    asked = survival.requests(survival.random_prompts(VOCAB, 12, rng), 16)
    lines = {line["side"]: line for line in survival.measure(engine, asked, rng)}
    engine.loaded.runner.close()
    assert lines["undisturbed"]["tokens"] == 12 * 16
    assert 12 <= lines["alone"]["tokens"] == lines["company"]["tokens"] < 12 * 16
    if deterministic:
        assert all(line["differ"] == line["bits_differ"] == 0 for line in lines.values())
    else:
        assert lines["alone"]["bits_differ"] > 0, "then the comparison would prove nothing"


def test_the_first_token_that_differs_is_found_with_its_gap(engine_dir: Path) -> None:
    engine = survival.Engine(engine_dir, num_rows=2, max_len=144, deterministic=True, num_threads=2)
    (request,) = survival.requests([[5, 6, 7] * 8], 12)
    whole = engine.run([survival.job(request)])
    replay = survival.cut(request, whole.ids[0], 4)
    run = engine.run([survival.job(replay)])
    assert survival.differences([replay], run, whole) == []
    run.ids[0][3:] = [(token + 1) % VOCAB for token in run.ids[0][3:]]
    (found,) = survival.differences([replay], run, whole)
    assert (found.position, found.before, found.after) == (3, whole.ids[0][7], run.ids[0][3])
    assert found.context.output_ids == tuple(whole.ids[0][:7])
    (gap,) = survival.gaps(engine, [found])
    engine.loaded.runner.close()
    assert gap > 0


def test_a_real_engine_gives_whole_answers_in_a_cache_that_is_too_small(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint")
    folder = make_engine(tmp_path / "checkpoint", tmp_path / "engine", "openvino", max_len=cache_pressure.MAX_MODEL_LEN)
    engine, times = cache_pressure.open_engine(folder, 4, 2), cache_pressure.StepTime()
    jobs = cache_pressure.Crowd(name="growing", num_requests=6, is_open=False).jobs(VOCAB, seed=1)
    sides = [cache_pressure.Side(), cache_pressure.Side(share=0.6, kv_admission="optimistic", has_host=True)]
    fits, small = cache_pressure.take_turn(cache_pressure.real(engine, times), 4, jobs, sides).values()
    engine.runner.close()
    assert small.run.counted("swaps_out") > 0
    assert all(len(small.run.ids[handle]) == len(ids) for handle, ids in fits.run.ids.items())
    assert times.costs() is not None
