"""A small random checkpoint, the engines made of it, and the loop that serves them in this process."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pageflight.core.config import EngineConfig, KVAdmission, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest, FileRecord
from pageflight.core.request import Request
from pageflight.core.stats import CoreStats
from pageflight.loop.engine_loop import Drain, EngineLoop, Submit
from pageflight.loop.in_memory import InMemoryMailbox
from pageflight.lowering import registry
from pageflight.models.checkpoint import open_checkpoint
from pageflight.quant.convert import convert
from pageflight.runners.factory import LoadedEngine, load_engine
from pageflight.sched.scheduler import Scheduler

VOCAB, MAX_LEN = 199, 160


def make_checkpoint(folder: Path, num_layers: int = 2, **changes: object) -> LlamaForCausalLM:
    """Saved to `folder` and returned; wide enough logits that no greedy choice is a near-tie."""
    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": VOCAB,
        "max_position_embeddings": MAX_LEN,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return model


def make_engine(
    checkpoint_dir: Path, folder: Path, lowering: str, max_len: int = MAX_LEN, dtype: str = "fp32", kv_dtype: str = ""
) -> Path:
    """An engine directory as `pageflight build` would make it; without `kv_dtype` that of the lowering's choice."""
    folder.mkdir()
    target = registry.get(lowering)
    config, checkpoint = open_checkpoint(checkpoint_dir)
    path = convert(checkpoint, config, folder / "model.safetensors", dtype=dtype).path
    data = path.read_bytes()
    EngineManifest(
        name="tiny",
        family=config.family,
        lowering=lowering,
        dtype=dtype,
        kv_dtype=kv_dtype or target.default_kv_dtype(dtype),
        block_size=32,
        max_model_len=max_len,
        vocab_size=config.vocab_size,
        model=config.to_json(),
        fingerprint=target.fingerprint(dtype),
        files=(FileRecord(path=path.name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),),
    ).write(folder)
    return folder


@dataclass(frozen=True)
class Served:
    ids: dict[int, list[int]]
    log_probs: dict[int, list[float]]
    reasons: dict[int, str]
    stats: CoreStats
    num_cached: dict[int, int]


def load(
    engine_dir: Path,
    *,
    num_blocks: int = 0,
    max_num_tokens: int = 64,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
    host_memory: int = 0,
    deterministic: bool = False,
    kv_admission: KVAdmission = "forecast",
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
) -> tuple[LoadedEngine, SchedulerConfig]:
    scheduler = SchedulerConfig(
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_LEN,
        deterministic=deterministic,
        kv_admission=kv_admission,
    )
    kv = KVConfig(
        num_blocks=num_blocks,
        memory_bytes=0 if num_blocks else 1 << 23,
        prefix_cache=prefix_cache,
        host_memory_bytes=host_memory,
    )
    config = EngineConfig(
        kv=kv,
        scheduler=scheduler,
        num_threads=2,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
    )
    return load_engine(engine_dir, config), scheduler


def serve(
    engine_dir: Path,
    requests: list[Request],
    *,
    num_blocks: int = 0,
    max_num_tokens: int = 64,
    max_num_seqs: int = 8,
    prefix_cache: bool = True,
    host_memory: int = 0,
    ahead: bool | None = None,
    deterministic: bool = False,
    tensor_parallel: int = 1,
) -> Served:
    """Run the requests to their ends through scheduler, loop and runner.

    A cache of a given size is one that is meant to be too small: nobody forecasts what will fit.
    """
    engine, config = load(
        engine_dir,
        num_blocks=num_blocks,
        max_num_tokens=max_num_tokens,
        max_num_seqs=max_num_seqs,
        prefix_cache=prefix_cache,
        host_memory=host_memory,
        deterministic=deterministic,
        kv_admission="optimistic" if num_blocks else "forecast",
        tensor_parallel=tensor_parallel,
    )
    served = serve_on(engine, config, requests, ahead=ahead)
    engine.runner.close()
    return served


def serve_on(
    engine: LoadedEngine, config: SchedulerConfig, requests: list[Request], *, ahead: bool | None = None
) -> Served:
    """Run the requests to their ends; nothing of an earlier call is found in the cache."""
    limits = engine.runner.limits
    settings = replace(config, max_model_len=limits.max_model_len, replay_rows=limits.replay_rows)
    scheduler = Scheduler(settings, engine.capacity.kv, vocab_size=limits.vocab_size)
    mailbox = InMemoryMailbox()
    mailbox.send(*[Submit(request) for request in requests], Drain())
    EngineLoop(scheduler=scheduler, runner=engine.runner, mailbox=mailbox, ahead=ahead).run()
    assert not mailbox.take_rejections()
    ids: dict[int, list[int]] = defaultdict(list)
    log_probs: dict[int, list[float]] = defaultdict(list)
    reasons, num_cached = {}, {}
    for events in mailbox.take_events():
        for index, handle in enumerate(events.handles.tolist()):
            ids[handle].append(int(events.ids[index]))
            if events.log_probs is not None:
                log_probs[handle].append(float(events.log_probs[index]))
        for finished in events.finished:
            assert finished.handle not in reasons
            reasons[finished.handle] = finished.reason
            num_cached[finished.handle] = finished.num_cached_tokens
    return Served(dict(ids), dict(log_probs), reasons, scheduler.stats(), num_cached)
