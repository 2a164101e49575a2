"""How many K/V blocks this machine, or this container, can hold.

The memory that is free is the least of what the machine has available and what each control group above this process
still allows (cgroup v2 and v1). File pages that the kernel would drop count as free, as `docker stats` counts them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pageflight.core.config import KVConfig, SchedulerConfig
from pageflight.core.errors import ConfigError

UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63
DEFAULT_FRACTION = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """`num_bytes` that can be had now, and the limit that says so."""

    num_bytes: int
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """The resolved cache: its size, why it has that size, and the longest sequence it can hold."""

    kv: KVConfig
    num_bytes: int
    max_sequence_len: int
    reason: str

    def with_blocks(self, num_blocks: int, why: str) -> Capacity:
        """The same where no more than `num_blocks` can be had."""
        if num_blocks >= self.kv.num_blocks:
            return self
        return replace(
            self,
            kv=replace(self.kv, num_blocks=num_blocks),
            num_bytes=self.num_bytes // self.kv.num_blocks * num_blocks,
            max_sequence_len=min(self.max_sequence_len, num_blocks * self.kv.block_size + 1),
            reason=f"{self.reason}; {num_blocks} blocks, for {why}",
        )


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` positions."""
    return -(-num_tokens // block_size)


def free_memory(proc: Path = Path("/proc/self"), cgroup: Path = Path("/sys/fs/cgroup")) -> FreeMemory:
    """Memory that this process can still get. The folders are parameters for tests."""
    import psutil  # type: ignore[import-untyped]  # whoever brings their own figures does without it

    found = [FreeMemory(num_bytes=int(psutil.virtual_memory().available), source="memory available on this machine")]
    for controllers, path in _memberships(proc / "cgroup"):
        if controllers == "":
            found += _walk_up(cgroup, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = cgroup / "memory"
            found += _walk_up(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return min(found, key=lambda memory: memory.num_bytes)


def resolve_capacity(
    kv: KVConfig,
    scheduler: SchedulerConfig,
    *,
    bytes_per_block: int,
    free: FreeMemory | None = None,
    host_free: FreeMemory | None = None,
    num_instances: int = 1,
    fraction: float = DEFAULT_FRACTION,
) -> Capacity:
    """Fix `num_blocks`: as given, else what `memory_bytes` holds, else `fraction` of free memory shared by instances.

    A size made from memory is never more than `max_num_seqs` sequences of `max_model_len` tokens could fill. A size
    that was *asked for* and does not hold one sequence of `max_model_len` tokens, or is more than what is free, is a
    ConfigError; a size that was *computed* from free memory then shortens what is admitted instead
    (`max_sequence_len`), and is a ConfigError only if not one block fits. Call it after the weights are loaded.
    `bytes_per_block`: K and V of all layers. `free`: of the memory that holds the blocks, this process's by default;
    `host_free`: of the memory that holds the second level, where that is another.
    """
    size, longest = kv.block_size, scheduler.max_model_len
    for name, value in (("block_size", size), ("bytes_per_block", bytes_per_block), ("num_instances", num_instances)):
        if value < 1:
            raise ConfigError(f"{name}={value}: must be at least 1")
    for name, value in (("num_blocks", kv.num_blocks), ("kv_memory", kv.memory_bytes)):
        if value < 0:
            raise ConfigError(f"{name}={value}: must not be negative (0 computes it)")
    num_host_blocks = _host_blocks(kv, bytes_per_block)
    if not 0 < fraction <= 1:
        raise ConfigError(f"kv_fraction={fraction}: must be above 0 and at most 1")
    # The last token of a sequence is never fed back, so its K/V is never stored.
    per_sequence = blocks_for(max(1, longest - 1), size)
    useful = per_sequence * scheduler.max_num_seqs
    needed_bytes = per_sequence * bytes_per_block
    free = free if free is not None else free_memory()
    if kv.num_blocks:
        num_blocks, reason = kv.num_blocks, "num_blocks as given"
        if num_blocks < per_sequence:
            raise ConfigError(
                f"num_blocks={num_blocks}: one sequence of max_model_len={longest} tokens needs {per_sequence} blocks; "
                f"raise num_blocks or set max_model_len to at most {num_blocks * size + 1}"
            )
    elif kv.memory_bytes:
        num_blocks, reason = kv.memory_bytes // bytes_per_block, f"kv_memory={kv.memory_bytes}"
        if num_blocks < per_sequence:
            raise ConfigError(
                f"kv_memory={kv.memory_bytes}: one sequence of max_model_len={longest} tokens needs {needed_bytes} "
                f"bytes; raise kv_memory or set max_model_len to at most {num_blocks * size + 1}"
            )
    else:
        share = int(free.num_bytes * fraction) // num_instances
        num_blocks, reason = share // bytes_per_block, f"{fraction:g} of {free.num_bytes} bytes ({free.source})"
        if num_blocks < 1:
            raise ConfigError(
                f"kv_memory=0: its computed share is {share} bytes ({reason}), one block needs {bytes_per_block}; "
                "free memory, or set kv_memory or a smaller max_num_seqs and max_model_len by hand"
            )
    if num_blocks > useful and not kv.num_blocks:
        num_blocks, reason = useful, f"max_num_seqs={scheduler.max_num_seqs} times max_model_len={longest}"
    if (kv.num_blocks or kv.memory_bytes) and num_blocks * bytes_per_block > free.num_bytes:
        option = f"num_blocks={kv.num_blocks}" if kv.num_blocks else f"kv_memory={kv.memory_bytes}"
        raise ConfigError(
            f"{option}: needs {num_blocks * bytes_per_block} bytes, {free.num_bytes} are free ({free.source}); "
            f"at most {free.num_bytes // bytes_per_block} blocks of {bytes_per_block} bytes fit"
        )
    host_bytes = num_host_blocks * bytes_per_block
    if host_free is not None and host_bytes > host_free.num_bytes:
        raise ConfigError(
            f"host_kv_memory={kv.host_memory_bytes}: at most {host_free.num_bytes} are free ({host_free.source})"
        )
    if host_free is None and host_bytes and host_bytes + num_blocks * bytes_per_block > free.num_bytes:
        raise ConfigError(
            f"host_kv_memory={kv.host_memory_bytes}: beside {num_blocks * bytes_per_block} bytes of blocks ({reason}) "
            f"at most {max(0, free.num_bytes - num_blocks * bytes_per_block)} are free ({free.source})"
        )
    return Capacity(
        kv=replace(kv, num_blocks=num_blocks, num_host_blocks=num_host_blocks),
        num_bytes=num_blocks * bytes_per_block,
        max_sequence_len=min(longest, num_blocks * size + 1),
        reason=reason,
    )


def _host_blocks(kv: KVConfig, bytes_per_block: int) -> int:
    """Blocks of the host tier. Raises ConfigError for a size that holds none."""
    if kv.host_memory_bytes < 0:
        raise ConfigError(f"host_kv_memory={kv.host_memory_bytes}: must not be negative (0: no host tier)")
    num_host_blocks = kv.host_memory_bytes // bytes_per_block
    if kv.host_memory_bytes and not num_host_blocks:
        raise ConfigError(f"host_kv_memory={kv.host_memory_bytes}: one block needs {bytes_per_block} bytes")
    return num_host_blocks


def _memberships(path: Path) -> list[tuple[str, str]]:
    """(controllers, path) of each line of /proc/self/cgroup; controllers is empty for v2."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:  # no control groups on this system
        return []
    fields = [line.split(":", 2) for line in lines]
    return [(field[1], field[2]) for field in fields if len(field) == 3]


def _walk_up(root: Path, path: str, limit_name: str, usage_name: str, cache_key: str) -> list[FreeMemory]:
    """What each group from `path` up to `root` leaves free. Inside a container `path` may not exist: then the root."""
    found = []
    folder = root / path.strip("/")
    while True:
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None and limit < UNLIMITED_BYTES:
            used = max(0, usage - _stat(folder / "memory.stat", cache_key))
            left = max(0, limit - used)
            found.append(FreeMemory(num_bytes=left, source=f"limit {limit} in {folder / limit_name}"))
        if folder == root or root not in folder.parents:
            return found
        folder = folder.parent


def _number(path: Path) -> int | None:
    """The integer in a control file; None where the file is missing or says `max`."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0
