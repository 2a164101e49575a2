from __future__ import annotations

from pathlib import Path

import pytest

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError
from pageflight.kv.capacity import Capacity, FreeMemory, free_memory, resolve_capacity

GIB = 1 << 30


def resolve(free_bytes: int = 64 * GIB, *, kv: KVConfig | None = None, fraction: float = 0.5) -> Capacity:
    """100 bytes per block of 32 tokens; 4 sequences of at most 321 tokens: 10 blocks each."""
    return resolve_capacity(
        kv or KVConfig(),
        SchedulerConfig(max_num_seqs=4, max_model_len=321),
        bytes_per_block=100,
        free=FreeMemory(num_bytes=free_bytes, source="test"),
        fraction=fraction,
    )


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_blocks_come_from_the_share_of_free_memory() -> None:
    """A guessed constant was too much for a small container and too little for a large machine."""
    capacity = resolve(6_000)
    assert capacity.kv.num_blocks == 30 and capacity.num_bytes == 3_000
    assert capacity.max_sequence_len == 321 and "test" in capacity.reason


def test_no_more_blocks_than_the_sequences_can_fill() -> None:
    """A server of small limits took half of the machine's memory for blocks that nothing could ever use."""
    assert resolve(64 * GIB).kv.num_blocks == 40
    assert resolve(64 * GIB, kv=KVConfig(memory_bytes=1_000_000)).kv.num_blocks == 40
    assert resolve(64 * GIB, kv=KVConfig(num_blocks=50)).kv.num_blocks == 50, "as given"


def test_little_free_memory_shortens_what_is_admitted() -> None:
    """A checkpoint with a long context would not start at all on a machine that could serve shorter prompts."""
    capacity = resolve(1_000)
    assert capacity.kv.num_blocks == 5 and capacity.max_sequence_len == 5 * 32 + 1


def test_all_ranks_have_the_blocks_of_the_poorest() -> None:
    """A plan named blocks that one rank did not have; and sequences were admitted that it could not hold."""
    capacity = resolve(6_000)
    fewer = capacity.with_blocks(5, "a rank has no more")
    assert (fewer.kv.num_blocks, fewer.num_bytes, fewer.max_sequence_len) == (5, 500, 161)
    assert "5 blocks" in fewer.reason and capacity.with_blocks(31, "") is capacity


def test_instances_share_the_memory() -> None:
    """Two instances that each took half left nothing for anyone else."""
    config = SchedulerConfig(max_num_seqs=64, max_model_len=321)
    free = FreeMemory(num_bytes=8_000, source="test")
    capacity = resolve_capacity(KVConfig(), config, bytes_per_block=100, free=free, num_instances=4)
    assert capacity.kv.num_blocks == 10


@pytest.mark.parametrize(
    ("kv", "free_bytes", "words"),
    [
        (KVConfig(num_blocks=9), GIB, ["num_blocks=9", "max_model_len=321", "10 blocks", "at most 289"]),
        (KVConfig(memory_bytes=950), GIB, ["kv_memory=950", "1000 bytes", "at most 289"]),
        (KVConfig(memory_bytes=2_000), 1_500, ["kv_memory=2000", "1500 are free", "15 blocks"]),
        (KVConfig(num_blocks=20), 1_500, ["num_blocks=20", "1500 are free"]),
        (KVConfig(), 150, ["kv_memory=0", "75 bytes", "100"]),
        (KVConfig(num_blocks=-1), GIB, ["num_blocks=-1"]),
        (KVConfig(memory_bytes=-5), GIB, ["kv_memory=-5"]),
        (KVConfig(host_memory_bytes=-5), GIB, ["host_kv_memory=-5"]),
        (KVConfig(host_memory_bytes=99), GIB, ["host_kv_memory=99", "100 bytes"]),
        (
            KVConfig(memory_bytes=2_000, host_memory_bytes=2_000),
            3_900,
            ["host_kv_memory=2000", "at most 1900"],
        ),
        (KVConfig(block_size=0), GIB, ["block_size=0"]),
    ],
)
def test_what_cannot_work_is_refused_with_option_value_and_limit(
    kv: KVConfig, free_bytes: int, words: list[str]
) -> None:
    """A cache smaller than one sequence made the first long request wait for ever."""
    with pytest.raises(ConfigError) as caught:
        resolve(free_bytes, kv=kv)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_a_fraction_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="kv_fraction"):
        resolve(fraction=fraction)


def test_a_cgroup_v2_limit_counts_and_file_pages_do_not(tmp_path: Path) -> None:
    """Containers report the host's memory; a cache sized by it was killed by the kernel."""
    write(tmp_path / "proc", cgroup="0::/a/b\n")
    group = tmp_path / "fs" / "a"
    write(group / "b", memory__max="max\n", memory__current="5\n", memory__stat="inactive_file 0\n")
    write(group, memory__max="1000\n", memory__current="700\n", memory__stat="anon 3\ninactive_file 200\n")
    memory = free_memory(tmp_path / "proc", tmp_path / "fs")
    assert memory.num_bytes == 500 and "limit 1000" in memory.source


def test_inside_a_container_the_root_of_the_mount_is_read(tmp_path: Path) -> None:
    """With a private cgroup namespace the path names a folder that is not mounted here."""
    write(tmp_path / "proc", cgroup="0::/\n")
    write(tmp_path / "fs", memory__max="900\n", memory__current="100\n")
    assert free_memory(tmp_path / "proc", tmp_path / "fs").num_bytes == 800
    write(tmp_path / "proc", cgroup="0::/docker/not/mounted\n")
    assert free_memory(tmp_path / "proc", tmp_path / "fs").num_bytes == 800


def test_a_cgroup_v1_limit_counts(tmp_path: Path) -> None:
    """Older hosts have one folder per controller, and write `no limit` as a huge number."""
    write(tmp_path / "proc", cgroup="12:cpu,cpuacct:/x\n5:memory:/x\n")
    folder = tmp_path / "fs" / "memory"
    files = {"memory__usage_in_bytes": "600\n", "memory__stat": "total_inactive_file 100\n"}
    write(folder / "x", **files, memory__limit_in_bytes="1000\n")
    write(folder, **files, memory__limit_in_bytes="9223372036854771712\n")
    assert free_memory(tmp_path / "proc", tmp_path / "fs").num_bytes == 500


def test_without_control_groups_the_machine_decides(tmp_path: Path) -> None:
    memory = free_memory(tmp_path, tmp_path)
    assert memory.num_bytes > 0 and "machine" in memory.source


def test_the_host_tier_has_a_size_of_its_own() -> None:
    """Blocks of the second level are the same bytes in other memory, in addition to the first level's."""
    capacity = resolve(6_000, kv=KVConfig(memory_bytes=2_000, host_memory_bytes=3_050))
    assert (capacity.kv.num_blocks, capacity.kv.num_host_blocks) == (20, 30)
    assert resolve().kv.num_host_blocks == 0
