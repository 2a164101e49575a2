"""Two engine instances with cores of their own on a real server: they share requests, and one carries on for both."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from grpc_stream import open_stream, tensor
from servers import Server, running_server, wait_for

from pageflight.core.devices import DeviceSet
from pageflight.core.placement import Placement
from pageflight.core.request import SamplingParams
from pageflight.loop.address import instance_address
from pageflight.loop.status import CoreStatus, read_status
from pageflight.runners.fake import fake_continuation
from pageflight_build.triton_config import Deployment, write_repository

NAME = "tiny"
CORES = (min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0)))
NUM_STREAMS, NUM_TOKENS = 24, 120  # of 10 ms each


def deployed(built: Path, folder: Path, vocab_size: int, *devices: DeviceSet) -> Path:
    """A repository of an engine without a model, with an instance on each of `devices`."""
    deployment = Deployment(
        name=NAME,
        instances=len(devices),
        placements=tuple(Placement(devices=each, engine_dir="1/artifacts") for each in devices),
        session_affinity="correlation",
        reroute_after_s=0.5,
        max_num_seqs=32,
        fake_engine=f'{{"kind":"checking","vocab_size":{vocab_size},"step_s":0.01,"start_s":0.4}}',
    )
    write_repository(folder, deployment)
    (folder / "engine" / "1" / "artifacts").symlink_to(built / "engine" / "1" / "artifacts", target_is_directory=True)
    return folder


@pytest.fixture(scope="module")
def pair(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server whose two instances have a processor core each, under Triton's rate limiter."""
    built, vocab_size = repository
    sets = [DeviceSet("cpu", (core,)) for core in CORES]
    folder = deployed(built, tmp_path_factory.mktemp("pair") / "repository", vocab_size, *sets)
    with running_server(folder, NAME, vocab_size, further=("--rate-limit=execution_count",)) as server:
        yield server, folder


def core_of(server: Server, folder: Path, instance: int) -> CoreStatus:
    status = read_status(instance_address(folder, "engine", instance, server_pid=server.process.pid).status)
    assert status is not None
    return status


def by_instance(server: Server, name: str) -> dict[str, float]:
    """The sums of a metric by its label `instance`."""
    found: dict[str, float] = {}
    for series, value in server.metrics().items():
        if series.partition("{")[0] == name:
            instance = series.partition('instance="')[2].partition('"')[0]
            found[instance] = found.get(instance, 0.0) + value
    return found


def inputs(number: int) -> list[triton.InferInput]:
    wishes: list[tuple[str, object, str]] = [
        ("input_ids", prompt(number), "INT32"),
        ("request_output_len", [NUM_TOKENS], "INT32"),
        ("streaming", [True], "BOOL"),
        ("ignore_eos", [True], "BOOL"),
    ]
    return [tensor(name, value, dtype, batched=True) for name, value, dtype in wishes]


def prompt(number: int) -> list[int]:
    return [5 + number, 7, 11 + number % 3] * 4


def test_each_instance_has_a_core_on_its_own_cores(pair: tuple[Server, Path]) -> None:
    """Both ran on all cores of the machine, and each slowed the other down."""
    server, folder = pair
    for instance, own in enumerate(CORES):
        tasks = list(Path(f"/proc/{core_of(server, folder, instance).core_pid}/task").iterdir())
        assert {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks} == {frozenset({own})}
    assert wait_for(lambda: by_instance(server, "pageflight_engine_ready") == {"0": 1.0, "1": 1.0})


@pytest.mark.parametrize("session", [7, "user-1"])
def test_a_conversation_stays_with_an_instance_through_every_model(pair: tuple[Server, Path], session: object) -> None:
    """Triton's correlation id of `infer`, and the parameter that it is of `generate`, are the same conversation."""
    server, _ = pair
    before = by_instance(server, "pageflight_routed_requests_total")
    for turn in range(4):
        assert server.text(text_input=f"turn {turn}", max_tokens=1, sequence_id=session)
    with triton.InferenceServerClient(server.grpc) as client:
        for turn in range(2):
            text = tensor("text_input", [f"turn {turn}".encode()], "BYTES")
            client.infer(f"{NAME}_unary", [text, tensor("max_tokens", [1], "INT32")], sequence_id=session)
    grown: dict[str, float] = {}

    def all_are_counted() -> bool:
        after = by_instance(server, "pageflight_routed_requests_total")
        grown.update({instance: value - before.get(instance, 0.0) for instance, value in after.items()})
        return sum(grown.values()) == 6

    assert wait_for(all_are_counted), grown
    assert sorted(value for value in grown.values() if value) == [6]


def test_one_instance_carries_on_for_one_that_is_held_dead(pair: tuple[Server, Path]) -> None:
    """Its streams stood still until somebody came. All of them end, with every id that they would have had."""
    server, folder = pair
    core, ids = core_of(server, folder, 0).core_pid, dict[int, list[int]]()
    held, num_ended = 0, 0
    with open_stream(server.grpc) as (client, arrived):
        for number in range(NUM_STREAMS):
            client.async_stream_infer(
                "engine", inputs(number), request_id=str(number), enable_empty_final_response=True
            )
        while num_ended < NUM_STREAMS:
            result, error = arrived.get(timeout=60)
            assert error is None, error
            response = result.get_response()
            if response.outputs:
                count = int(result.as_numpy("sequence_length").ravel()[0])
                ids.setdefault(int(response.id), []).extend(result.as_numpy("output_ids").ravel()[:count].tolist())
            num_ended += response.parameters["triton_final_response"].bool_param
            if not held and sum(map(len, ids.values())) > 20 * NUM_STREAMS:
                os.kill(core, signal.SIGKILL)
                assert wait_for(lambda: core_of(server, folder, 0).core_pid not in (0, core))
                held = core_of(server, folder, 0).core_pid
                os.kill(held, signal.SIGSTOP)
    try:
        for number in range(NUM_STREAMS):
            sampling = SamplingParams(max_tokens=NUM_TOKENS)
            assert ids[number] == fake_continuation(prompt(number), sampling, vocab_size=server.vocab_size)
        assert core_of(server, folder, 0).state == "restarting"
        assert wait_for(lambda: by_instance(server, "pageflight_engine_ready") == {"0": 0.0, "1": 1.0})
        assert wait_for(lambda: sum(by_instance(server, "pageflight_rerouted_sequences_total").values()) > 0)
        texts = [server.text(text_input=f"another {number}", max_tokens=3) for number in range(6)]
        assert all(texts), "new requests go to the one that lives"
    finally:
        os.kill(held, signal.SIGCONT)
    assert wait_for(lambda: by_instance(server, "pageflight_engine_ready") == {"0": 1.0, "1": 1.0})
