"""What decides who runs, behind the real server: tenants, a cache that is too small, host memory."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import tritonclient.grpc as triton
from commands import Served, serving
from grpc_stream import Stream, stream, tensor, text_tensor
from servers import wait_for
from tritonclient.utils import InferenceServerException

from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

NAME = "tiny"
BLOCK_BYTES = 1 << 14  # of the tiny model in fp32, 32 tokens
NUM_TOKENS = 440  # 15 blocks with the prompt
QUOTAS = {"tenants": {"shop": {"weight": 3}, "small": {"max_running": 1, "max_waiting": 2}}}


@dataclass(frozen=True)
class Shared:
    """A server for several tenants, and the file that says what each of them gets."""

    served: Served
    tenants: Path


@pytest.fixture(scope="module")
def shared(repository: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Eight rows, blocks for one long answer and a bit, and host memory for the rest."""
    built, vocab_size = repository
    folder = tmp_path_factory.mktemp("shared")
    shutil.copytree(built, folder / "repository", symlinks=True)
    tenants = folder / "tenants.json"
    tenants.write_text(json.dumps(QUOTAS))
    options = ServingOptions(
        scheduling_policy="fair",
        tenants=str(tenants),
        kv_memory=18 * BLOCK_BYTES,
        host_kv_memory=64 * BLOCK_BYTES,
        kv_admission="optimistic",
        target_inter_token_ms=20.0,
        max_num_seqs=8,
    )
    engine = EngineOptions(dtype="fp32")
    checkpoint = built.parent / "checkpoint"
    build(
        BuildOptions(checkpoint=checkpoint, repository=folder / "repository", name=NAME, engine=engine, serving=options)
    )
    with serving(folder / "repository", NAME, vocab_size) as running:
        yield Shared(running, tenants)


def ask(
    served: Served,
    number: int,
    *,
    tenant: str,
    num_answers: int = 1,
    begun: threading.Event | None = None,
) -> Stream:
    """A stream of a prompt of its own; odd numbers are sampled."""
    inputs = [
        text_tensor(f"the fox number {number} runs over the dog and"),
        tensor("tenant", [tenant.encode()], "BYTES"),
        tensor("max_tokens", [NUM_TOKENS], "INT32"),
        tensor("num_return_sequences", [num_answers], "INT32"),
        tensor("temperature", [float(number % 2)], "FP32"),
        tensor("seed", [number], "UINT64"),
        tensor("ignore_eos", [True], "BOOL"),
        tensor("return_finish_reason", [True], "BOOL"),
        tensor("stream", [True], "BOOL"),
    ]
    return stream(served.grpc, NAME, inputs, begun)


def test_answers_of_a_crowd_are_those_of_each_alone(shared: Shared) -> None:
    """Four streams in a cache for one: sequences lose their blocks and come back from host memory
    beside the prompts of others. Behind the real server nothing of that had been looked at."""
    served, tenants = shared.served, ["shop", "batch", "", "shop"]
    alone = [ask(served, number, tenant=tenants[number]) for number in range(4)]
    before = served.metrics()
    with ThreadPoolExecutor(4) as pool:
        crowd = list(pool.map(lambda number: ask(served, number, tenant=tenants[number]), range(4)))
    assert [each.errors for each in crowd] == [[]] * 4 and [each.num_final for each in crowd] == [1] * 4
    assert [each.joined() for each in crowd] == [each.joined() for each in alone]

    def grown(*names: str) -> float:
        def total(series: dict[str, float]) -> float:
            return sum(value for text, value in series.items() if text.partition("{")[0] in names)

        return total(served.metrics()) - total(before)

    assert wait_for(lambda: grown("pageflight_preemptions_total") > 0)
    assert wait_for(lambda: grown("pageflight_kv_swaps_total", "pageflight_kv_copied_blocks_total") > 0)


def refusal(shared: Shared, tenant: str) -> str:
    """Why four answers at once are refused, of which three must wait; empty when they are not."""
    inputs = [
        text_tensor("the fox"),
        tensor("tenant", [tenant.encode()], "BYTES"),
        tensor("max_tokens", [2], "INT32"),
        tensor("num_return_sequences", [4], "INT32"),
    ]
    with triton.InferenceServerClient(shared.served.grpc) as client:
        try:
            client.infer(f"{NAME}_unary", inputs)
        except InferenceServerException as error:
            return str(error)
    return ""


def test_a_quota_names_its_tenant_and_is_read_again(shared: Shared) -> None:
    """A full queue was everybody's, and nobody was told whose it was."""
    said = refusal(shared, "small")
    assert "UNAVAILABLE" in said and "queue of tenant 'small' is full" in said and "limit 2" in said
    assert refusal(shared, "shop") == "" and refusal(shared, "nobody") == ""
    changed = shared.tenants.with_suffix(".new")
    changed.write_text(json.dumps({"tenants": {"small": {"max_running": 1, "max_waiting": 3}}}))
    os.replace(changed, shared.tenants)
    assert wait_for(lambda: refusal(shared, "small") == "")
    shared.tenants.write_text("{")
    assert refusal(shared, "small") == "", "a file with a mistake changes nothing"
