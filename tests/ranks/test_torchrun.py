"""`pageflight node` as torchrun and a LeaderWorkerSet start it, with NVIDIA's server on the leader."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
from engines import serve
from joined import PAGEFLIGHT, free_port
from servers import free_ports, wait_for
from tiny_checkpoint import make_tiny_checkpoint

from pageflight.cli.errors import CommandError
from pageflight.cli.machines import Machines, machines_of
from pageflight.cli.node import Part, part_of
from pageflight.core.request import Request, SamplingParams
from pageflight.text.tokenizer import Tokenizer
from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

PROMPT, NUM_TOKENS = "the quick brown fox", 24
CLOSE = {"Connection": "close"}
"""Triton waits for idle connections before it ends."""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks on two machines."""
    folder = tmp_path_factory.mktemp("nodes")
    make_tiny_checkpoint(folder / "checkpoint")
    serving = ServingOptions(
        kv_memory=16 << 20, max_num_seqs=8, threads=1, tensor_parallel=2, launcher="external", nodes=2, rank_wait_s=60
    )
    options = BuildOptions(
        checkpoint=folder / "checkpoint",
        repository=folder / "repository",
        name="tiny",
        engine=EngineOptions(engine="torch", dtype="fp32"),
        serving=serving,
    )
    build(options)
    return folder / "repository"


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    """The answer of one rank."""
    engine = repository / "engine" / "1" / "artifacts"
    tokenizer = Tokenizer.load(engine / "tokenizer")
    ids = tuple(tokenizer.encode(PROMPT))
    served = serve(engine, [Request(handle=1, prompt_ids=ids, sampling=SamplingParams(max_tokens=NUM_TOKENS))])
    return tokenizer.decode(served.ids[1])


def edited(repository: Path, folder: Path, **parameters: object) -> Path:
    """A copy with other settings, as if by hand."""
    shutil.copytree(repository, folder)
    config = folder / "engine" / "config.pbtxt"
    content = config.read_text()
    for name, value in parameters.items():
        content, count = re.subn(rf'(key: "{name}"\s+value {{\s+string_value: ")[^"]*', rf"\g<1>{value}", content)
        assert count == 1
    config.write_text(content)
    return folder


@contextmanager
def agents(repository: Path, num_nodes: int, num_local: int) -> Iterator[str]:
    """torchrun on so many machines; the URL of the server that the first one starts."""
    ports, meeting = free_ports(), free_port()
    flags = ["--host=127.0.0.1", f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", "--exit-timeout-secs=15"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}

    def agent(number: int) -> Sequence[str]:
        return [
            *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={num_nodes}", f"--node-rank={number}"),
            *("--master-addr=127.0.0.1", f"--master-port={meeting}", f"--nproc-per-node={num_local}", "--no-python"),
            *(sys.executable, "-c", PAGEFLIGHT, "node", str(repository), *flags, f"--metrics-port={ports.metrics}"),
        ]

    started = [subprocess.Popen(agent(number), env=environment) for number in range(num_nodes)]
    family = [psutil.Process(each.pid) for each in started]
    try:
        yield f"http://127.0.0.1:{ports.http}"
        family += [child for each in family for child in each.children(recursive=True)]
        if num_nodes > 1:  # once is enough: Triton takes its time
            for each in started:
                each.terminate()
            _, left = psutil.wait_procs(family, timeout=40)
            assert not left, "nothing outlives its agent"
    finally:
        for each in family:
            with suppress(psutil.NoSuchProcess):
                for child in (*each.children(recursive=True), each):
                    child.kill()
        for each in started:
            each.wait()


def answer(url: str) -> str:
    def is_ready() -> bool:
        try:
            return requests.get(f"{url}/v2/health/ready", headers=CLOSE, timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    assert wait_for(is_ready, 90.0)
    body = {"text_input": PROMPT, "max_tokens": NUM_TOKENS}
    response = requests.post(f"{url}/v2/models/tiny/generate", json=body, headers=CLOSE, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["text_output"]


@pytest.mark.parametrize(("num_nodes", "num_local"), [(2, 1), (1, 2)])
def test_torchrun_serves_what_one_process_serves(
    repository: Path, tmp_path: Path, text: str, num_nodes: int, num_local: int
) -> None:
    """A process on each machine, or one for each rank: both are usual, and a server came up twice, or waited for a rank
    that the core was to start."""
    folder = edited(repository, tmp_path / "repository", nodes=num_nodes, rank_port=free_port())
    with agents(folder, num_nodes, num_local) as url:
        assert answer(url) == text


TORCHRUN = {"GROUP_RANK": 1, "LOCAL_WORLD_SIZE": 1, "WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "a"}
LWS = {"LWS_LEADER_ADDRESS": "a.b", "LWS_GROUP_SIZE": 2, "LWS_WORKER_INDEX": 1}
MACHINES = Machines(num_ranks=16, num_nodes=2, rank_port=29600)


def part(environment: dict[str, object], **changes: object) -> Part:
    return part_of({name: str(value) for name, value in {**environment, **changes}.items()}, MACHINES)


def test_what_a_machine_is_follows_from_its_environment() -> None:
    """Ranks of the second machine had the GPUs of the first ones' numbers, which it does not have."""
    second = {rank: rank - 8 for rank in range(8, 16)}
    assert part(LWS) == Part(leads=False, leader="a.b", devices=second)
    assert part(LWS, LWS_WORKER_INDEX=0) == Part(leads=True, leader="a.b", devices={})
    assert part(TORCHRUN) == Part(leads=False, leader="a", devices=second)
    assert part(TORCHRUN, GROUP_RANK=0, RANK=0).leads
    each = {"LOCAL_WORLD_SIZE": 8, "WORLD_SIZE": 16}
    assert part(TORCHRUN, **each, RANK=11, LOCAL_RANK=3) == Part(
        leads=False, leader="a", devices={11: 3}, every_rank_joins=True, verifies=False
    )
    assert part(TORCHRUN, **each, GROUP_RANK=0, RANK=2, LOCAL_RANK=2).devices == {2: 2}
    first = part(TORCHRUN, **each, GROUP_RANK=0, RANK=0)
    assert first.leads and first.every_rank_joins
    assert not part(TORCHRUN, GROUP_RANK=0, RANK=0).every_rank_joins
    hashing = [
        rank
        for rank in range(16)
        if part(TORCHRUN, **each, GROUP_RANK=rank // 8, RANK=rank, LOCAL_RANK=rank % 8).verifies
    ]
    assert hashing == [0, 8], "each machine's first, of which the leader's is the core; eight read the disk at once"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "neither torchrun .* nor a LeaderWorkerSet .* `pageflight join` on the others"),
        ({**LWS, "LWS_GROUP_SIZE": 3}, "LWS_GROUP_SIZE=3: the model was built for nodes=2"),
        ({**LWS, "LWS_WORKER_INDEX": "x"}, "LWS_WORKER_INDEX='x': must be a whole number"),
        ({**LWS, "LWS_WORKER_INDEX": 2}, "node-rank=2: the model was built for nodes=2"),
        ({**TORCHRUN, "WORLD_SIZE": 3}, "WORLD_SIZE=3: the model was built for nodes=2"),
        (
            {**TORCHRUN, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 4},
            "starts 4 of 8 processes here; .* for 16 ranks, 8 on each",
        ),
    ],
)
def test_a_size_that_is_not_the_models_is_refused_before_anything_starts(
    environment: dict[str, object], words: str
) -> None:
    """Everybody waited for ranks that nobody had been asked to start."""
    with pytest.raises(CommandError, match=words):
        part(environment)


def test_machines_are_read_off_the_repository(repository: Path, tmp_path: Path) -> None:
    machines = machines_of(repository)
    assert machines == Machines(num_ranks=2, num_nodes=2, rank_port=29600) and machines.ranks_of(1) == range(1, 2)
    with pytest.raises(CommandError, match="has no engine with launcher external"):
        machines_of(edited(repository, tmp_path / "local", launcher="local"))
    with pytest.raises(CommandError, match=r"nodes=3 must divide the 2 ranks; build it again"):
        machines_of(edited(repository, tmp_path / "three", nodes=3))
