"""The soak's own bookkeeping, each check of which can fail, and a short soak of a real server."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from perf.processes import Life, Sample, num_zombies, tree
from perf.soak.checks import Check
from perf.soak.ended import Ended
from perf.soak.errand import Ask, Ending, Errand, Fault, Target, Via
from perf.soak.footprint import FDS_SLACK, Footprint, compare
from perf.soak.memory import MIN_SAMPLES, Memory, slope
from perf.soak.mix import Mix
from perf.soak.observer import Observer
from perf.soak.outages import Outages
from perf.soak.run import held
from perf.soak.verdict import Outcome, Tally, Verdict, judge
from perf.soak.vocabulary import Vocabulary
from tiny_checkpoint import MAX_POSITIONS, make_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]
NAME = "demo"
ASK = Ask(prompt="def f(", max_tokens=8)
TEXT = "x):\n    return x"
ERRAND = Errand(number=7, via=Via.GRPC, target=Target.TEXT, ask=ASK)
BAD = Fault(name="top_p", via=Via.HTTP, target=Target.TEXT, expected="top_p=7.0: must be")
LOST = "the process of demo that had this request died; send it again"


def ended(
    error: str | None = None, text: str = TEXT, reasons: tuple[str, ...] = ("length",), **further: object
) -> Ended:
    made = Ended(started_s=10.0, ended_s=11.0, error=error, num_finals=0 if error else 1)
    if error is None:
        made.texts, made.reasons = {0: text}, {0: list(reasons)} if reasons else {}
    for name, value in further.items():
        setattr(made, name, value)
    return made


def outages(*models: str, end_s: float = math.inf) -> Outages:
    made = Outages()
    for model in models:
        made.begin(model, 10.5).end_s = end_s
    return made


def judged(what: Ended, errand: Errand = ERRAND, away: Outages | None = None) -> Verdict:
    return judge(errand, what, {ASK: [TEXT]}, away or Outages(), NAME)


@pytest.mark.parametrize(
    ("errand", "what", "expected"),
    [
        (ERRAND, ended(), Outcome.COMPLETED),
        (replace(ERRAND, fault=BAD), ended("top_p=7.0: must be at most 1"), Outcome.REFUSED),
        (ERRAND, ended("queue is full: 16 requests waiting, limit 16; 10 prompt …"), Outcome.OVERFLOW),
        (replace(ERRAND, ending=Ending.CANCEL), ended(text=TEXT[:5], reasons=(), has_left=True), Outcome.CANCELLED),
        (replace(ERRAND, ending=Ending.DISCONNECT), ended(reasons=(), has_left=True), Outcome.DISCONNECTED),
        (replace(ERRAND, ending=Ending.STOP), ended("the request was cancelled"), Outcome.CANCELLED),
    ],
)
def test_what_is_expected_has_a_name(errand: Errand, what: Ended, expected: Outcome) -> None:
    assert judged(what, errand) == Verdict(expected)


@pytest.mark.parametrize(
    ("errand", "what", "reason"),
    [
        (ERRAND, ended(text="x):\n    return y"), "at character 15 of 16"),
        (replace(ERRAND, ending=Ending.CANCEL), ended(text="y", reasons=(), has_left=True), "at character 0"),
        (ERRAND, ended(has_hung=True), "no end after 1 s"),
        (ERRAND, ended(num_finals=2), "2 final responses"),
        (ERRAND, ended(reasons=("length", "length")), "more than one finish reason for sequences [0]"),
        (ERRAND, ended(num_after_final=1), "1 responses after the final one"),
        (ERRAND, ended(num_finals=0), "without a final response"),
        (ERRAND, ended(reasons=()), "finish reasons for sequences [] only"),
        (ERRAND, ended(reasons=("cancelled",)), "finish reasons ['cancelled']"),
        (ERRAND, ended('Traceback (most recent call last): File "x"'), "a traceback"),
        (ERRAND, ended("something else"), "unexpected error"),
        (ERRAND, ended("timeout_ms passed before it finished"), "unexpected error"),
        (ERRAND, ended(LOST), "unexpected error"),
        (replace(ERRAND, fault=BAD), ended(text="", reasons=("stop",)), "bad input was accepted"),
        (replace(ERRAND, fault=BAD, via=Via.HTTP), ended(BAD.expected, status=500), "HTTP status 500"),
    ],
)
def test_everything_else_is_a_failure(errand: Errand, what: Ended, reason: str) -> None:
    """A soak that forgives what it does not know finds nothing."""
    verdict = judged(what, errand if errand.fault is None else replace(errand, ask=Ask(prompt="", max_tokens=1)))
    assert verdict.outcome is Outcome.FAILED and reason in verdict.reason


def test_only_requests_to_a_killed_stub_may_be_lost() -> None:
    """An outage of one model would excuse the loss of every request to all others."""
    assert judged(ended(LOST), away=outages(NAME)).outcome is Outcome.STUB_LOST
    assert judged(ended("Stub process 'demo_0' is not healthy."), away=outages(NAME)).outcome is Outcome.AWAY
    assert judged(ended("something else"), away=outages(NAME)).outcome is Outcome.FAILED
    assert judged(ended(LOST), away=outages("engine", "ensemble")).outcome is Outcome.FAILED
    over = Outages()
    over.begin(NAME, 1.0).end_s = 9.0
    assert judged(ended(LOST), away=over).outcome is Outcome.FAILED
    ensemble = replace(ERRAND, target=Target.ENSEMBLE)
    assert judged(ended(LOST), ensemble, outages("preprocessing")).outcome is Outcome.STUB_LOST
    assert outages(NAME).never_ended == [NAME] and over.never_ended == []


def test_a_request_without_an_outcome_is_missed() -> None:
    tally = Tally(num_sent=2)
    tally.add(ERRAND, Verdict(Outcome.COMPLETED))
    assert tally.num_unaccounted == 1
    tally.add(ERRAND, Verdict(Outcome.FAILED, "why"))
    assert tally.num_unaccounted == 0 and tally.failures == ["request 7 (grpc to text, wait): why"]


def test_the_slope_is_that_of_growth_and_not_of_restarts() -> None:
    """A core that is started again is smaller than the one before: a straight line through both falls."""
    growing = [[(float(t), 1000 * life + 10.0 * t) for t in range(MIN_SAMPLES)] for life in (9, 1)]
    assert slope(growing) == pytest.approx(600)  # 10 KiB/s
    assert slope([[(float(t), 5.0) for t in range(MIN_SAMPLES)]]) == 0
    assert slope([[(0.0, 1.0), (1.0, 2.0)]]) is None


def test_growth_is_told_by_role_and_only_of_the_time_asked_for() -> None:
    memory, lives = Memory(), [Life("core", 1, 5), Life("core", 2, 6), Life("serve", 3, 7)]
    for at_s in range(3 * MIN_SAMPLES):
        samples = [
            Sample(life=life, parent=0, rss_kib=at_s * life.pid, num_fds=1, num_threads=1, cpu_s=0) for life in lives
        ]
        memory.add(float(at_s), samples)
    core, serve = memory.growth(MIN_SAMPLES, 1e9)
    assert (core.role, core.num_samples, core.slope_kib_min) == ("core", 4 * MIN_SAMPLES, pytest.approx(90))
    assert (serve.first_kib, serve.last_kib, serve.slope_kib_min) == (
        3 * MIN_SAMPLES,
        9 * MIN_SAMPLES - 3,
        pytest.approx(180),
    )


BEFORE = Footprint(
    roles=Counter({"core": 1, "tritonserver": 1}),
    num_fds={"core": 20, "tritonserver": 60},
    num_threads={"core": 5, "tritonserver": 200},
    segments=frozenset(("a", "b")),
    files=frozenset(("commands", "stubs/4711")),
    num_zombies=0,
)


@pytest.mark.parametrize(
    ("after", "failed"),
    [
        ({}, ""),
        ({"files": frozenset(("commands", "stubs/4712"))}, ""),
        ({"num_fds": {"core": 20 + FDS_SLACK, "tritonserver": 60}}, ""),
        ({"num_fds": {"core": 21 + FDS_SLACK, "tritonserver": 60}}, "open files of core"),
        ({"num_threads": {"core": 5, "tritonserver": 300}}, "threads of tritonserver"),
        ({"roles": Counter({"core": 2, "tritonserver": 1})}, "roles whose number of processes changed"),
        ({"roles": Counter({"core": 1})}, "roles whose number of processes changed"),
        ({"segments": frozenset("abc")}, "shared-memory segments more than before"),
        ({"files": frozenset(("commands", "events", "stubs/4711"))}, "files in the meeting place more than before"),
        ({"num_zombies": 1}, "killed stubs that tritonserver could not unload"),
    ],
)
def test_each_leak_fails_its_check(after: dict[str, object], failed: str) -> None:
    checks = compare(BEFORE, replace(BEFORE, **after), num_stub_kills=0)  # type: ignore[arg-type]
    assert [check.name for check in checks if not check.is_ok] == ([failed] if failed else [])


def test_only_what_a_killed_stub_leaves_in_tritonserver_is_forgiven() -> None:
    """Triton cannot unload every model whose stub was killed; that must not hide a leak of the others."""
    after = replace(BEFORE, num_zombies=1, segments=frozenset("abcd"), num_threads={"core": 5, "tritonserver": 270})
    assert all(check.is_ok for check in compare(BEFORE, after, num_stub_kills=1))
    assert not all(check.is_ok for check in compare(BEFORE, after, num_stub_kills=0))
    more = replace(after, segments=frozenset("abcde"), num_threads={"core": 50, "tritonserver": 290})
    failed = {check.name for check in compare(BEFORE, more, num_stub_kills=1) if not check.is_ok}
    assert failed == {"shared-memory segments more than before", "threads of tritonserver", "threads of core"}


@pytest.mark.parametrize(
    ("series", "is_held"),
    [
        ({'nv_trt_llm_request_metrics{request_type="active"}': 0.0}, False),
        ({'nv_trt_llm_request_metrics{request_type="active"}': 1.0}, True),
        ({'nv_trt_llm_request_metrics{request_type="max"}': 8.0}, False),
        ({'pageflight_kv_host_blocks{kind="max"}': 8.0, 'pageflight_kv_host_blocks{kind="free"}': 8.0}, False),
        ({'pageflight_kv_host_blocks{kind="max"}': 8.0, 'pageflight_kv_host_blocks{kind="free"}': 7.0}, True),
    ],
)
def test_a_held_block_is_no_idle_server(series: dict[str, float], is_held: bool) -> None:
    assert bool(held(series)) is is_held


def test_counters_survive_the_process_that_counted() -> None:
    """The metrics of a stub that was started again begin at zero."""
    observer = Observer(running=None)  # type: ignore[arg-type]
    for value in (3.0, 5.0, 1.0, 2.0):
        observer.count({'pageflight_preemptions_total{model="engine"}': value, "nv_trt_llm_other": value})
    assert observer.counted == {"preemptions": 7}


def test_processes_are_found_with_what_they_hold() -> None:
    program = "import subprocess, sys, time; child = subprocess.Popen(['true']); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            assert wait_for(lambda: num_zombies(process.pid) == 1)
            (sample,) = tree(process.pid)
            assert sample.life.pid == process.pid and sample.life.is_running
            assert sample.rss_kib > 1000 and sample.num_fds >= 3 and sample.num_threads == 1
        finally:
            process.kill()
    assert not sample.life.is_running and tree(process.pid) == []


def wait_for(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + 10
    while time.monotonic() < until_s and not condition():
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("soak") / "tiny"
    yield folder, make_tiny_checkpoint(folder)


def mix(checkpoint: tuple[Path, int], seed: int) -> Mix:
    vocabulary = Vocabulary(checkpoint[0] / "tokenizer.json")
    return Mix(vocabulary, max_model_len=MAX_POSITIONS, vocab_size=checkpoint[1], max_queue_size=16, seed=seed)


def test_a_seed_is_a_load_and_the_load_has_everything(checkpoint: tuple[Path, int]) -> None:
    """A kind of request that never came was never tried."""
    first, again, other = mix(checkpoint, 1), mix(checkpoint, 1), mix(checkpoint, 2)
    drawn = [first.draw() for _ in range(600)]
    assert drawn == [again.draw() for _ in range(600)] != [other.draw() for _ in range(600)]
    assert first.known == again.known != other.known
    assert {errand.via for errand in drawn} == set(Via) and {errand.target for errand in drawn} == set(Target)
    assert {errand.ending for errand in drawn} == set(Ending)
    assert len({errand.fault.name for errand in drawn if errand.fault is not None}) == len(first.faults)
    asked = {name for errand in drawn for name, _ in errand.ask.options}
    assert {"num_return_sequences", "stop_words", "return_log_probs", "seed", "priority", "tenant"} <= asked
    assert all(
        errand.ask.option("temperature", 0.0) == 0 or "seed" in dict(errand.ask.options)
        for errand in first.first_round()
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_check_fails_beyond_its_limit_alone(value: float) -> None:
    assert Check("x", value, 0).is_ok is (value == 0) and ("FAILED" in str(Check("x", value, 0))) is (value > 0)


def test_a_short_soak_of_a_real_server_finds_nothing(checkpoint: tuple[Path, int], tmp_path: Path) -> None:
    """A kill of the core, cancellations, broken connections and bad input in ten seconds; every check holds."""
    arguments = ["--checkpoint", str(checkpoint[0]), "--minutes", "0.12", "--clients", "6", "--warm-up", "2", "--idle"]
    arguments += [
        "1.5",
        "--core-kill-every",
        "1.5",
        "--stub-kill-every",
        "0",
        "--kv-memory",
        "1MiB",
        "--host-kv-memory",
    ]
    arguments += ["512KiB", "--check-invariants", "1", "--keep", str(tmp_path / "log"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "perf.soak", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    record = json.loads(done.stdout.splitlines()[-1])
    assert record == json.loads((tmp_path / "out").read_text())
    assert record["ok"] and record["failed"] == [] and record["core_kills"] >= 2 and record["engine_restarts"] >= 1
    assert sum(record["outcomes"].values()) == record["requests"] > 50
