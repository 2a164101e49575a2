"""TensorRT behind the runner: which flavors take the card, what serves an engine directory here, and captured steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from pageflight.core.config import EngineConfig, KVConfig, SchedulerConfig
from pageflight.core.manifest import EngineManifest
from pageflight.core.request import Request, SamplingParams
from pageflight.kv.capacity import FreeMemory
from pageflight.lowering.engine_dir import open_engine
from pageflight.lowering.tensorrt_lowering import TensorRtLowering
from pageflight.lowering.tensorrt_model import load_segments
from pageflight.lowering.tensorrt_target import FLAVORS, WEIGHTS, TensorRtTarget
from pageflight.lowering.torch_lowering import TorchLowering
from pageflight.quant.forms import weight_forms
from pageflight.runners import device_factory
from pageflight.runners.device import DeviceRunner
from perf.gpu_check.card import Card, Record
from perf.gpu_check.engine_checks import drive, make_scheduler
from perf.gpu_check.tensorrt_flavors import lowered, tiny, tried, usable, walked
from perf.gpu_check.tensorrt_models import RandomTensors, write_engine

NUM_TOKENS = 9  # of a request: some steps come before all of a wave decode, two more before their size is captured
WAVES = (6, 4, 2, 4, 6)
"""Requests at a time: 4 and 2 run one profile, and graphs of both have been captured when 4 run again."""


def answers(card: Card, folder: Path) -> Iterator[Record]:
    """For every flavor: does it take this card, and why not; then what serves an engine directory here.

    A flavor that is not installed is no failure.
    """
    for flavor in FLAVORS:
        yield {"name": f"tensorrt {flavor}", **tried(flavor, card)[0]}
    yield _served_here(card, folder / "engine")


def _served_here(card: Card, folder: Path) -> Record:
    """An engine directory of TensorRT is served on this card by what takes it; the ids are those of our kernels."""
    config, dtype = tiny(card), "bf16" if card.is_gpu else "fp32"
    weights = RandomTensors(weight_forms(config, dtype))
    flavor = next(usable(card), None)
    target = None if flavor is None else flavor.target("input", 4, 64)
    if flavor is None and tried("rtx", card)[1] is not None:  # it builds for other cards: is that noticed in time?
        target = TensorRtTarget(max_num_seqs=4, max_num_tokens=64)
    write_engine(folder, config, weights, dtype, target)
    with _warnings("pageflight.runners.device_factory") as warnings:
        ids = _ids(folder, card)
    found = {"name": "load_on_gpu", "flavor": "none" if flavor is None else flavor.flavor}
    if flavor is None or not card.is_gpu:
        assert warnings, "nothing can run these engines here, and nothing was said"
    if warnings:
        assert "it runs on kernels of our own instead" in warnings[0], warnings
        fingerprint = TorchLowering().fingerprint(dtype)
        replace(EngineManifest.read(folder), lowering="torch", fingerprint=fingerprint).write(folder)
        assert ids == _ids(folder, card), "the fallback gives other ids than the kernels"
        return {**found, "runs_on": "kernels", "reason": warnings[0], "ids": len(ids)}
    return {**found, "runs_on": "TensorRT", "reason": "", "ids": len(ids)}


def graphs(card: Card, folder: Path) -> Iterator[Record]:
    """Decode steps of all segments with our attention between them: captured ones give the ids of eager ones."""
    config, dtype = tiny(card), "bf16" if card.is_gpu else "fp32"
    for flavor in usable(card):
        for form in WEIGHTS:
            place = folder / f"{flavor.flavor}-{form}"
            weights = RandomTensors(weight_forms(config, dtype))
            write_engine(place, config, weights, dtype, flavor.target(form, 8, 128))
            found = []
            for uses_graphs in (False, True):
                engine = open_engine(place, "tensorrt")
                if card.is_gpu:
                    model = load_segments(engine, place, card.device)
                else:
                    networks = lowered(flavor.trt, config, weights, TensorRtLowering().activations(dtype), form)
                    model = load_segments(engine, place, card.device, walked(flavor, networks))
                runner = DeviceRunner(
                    model,
                    num_blocks=32,
                    max_num_seqs=8,
                    max_num_tokens=128,
                    max_model_len=96,
                    uses_graphs=uses_graphs,
                )
                with _warnings("pageflight.runners.device_graphs") as warnings:
                    found.append(_served(runner, WAVES if card.is_gpu else (1,)))
                runner.close()
                assert not warnings, warnings  # steps that cannot be captured run eagerly, and give the same ids
            assert found[0] == found[1], "captured steps give other ids than eager ones"
            yield {"name": f"graphs {flavor.flavor} {form}", "tokens": sum(map(len, found[0].values()))}


def _ids(folder: Path, card: Card) -> dict[int, list[int]]:
    kv = KVConfig(num_blocks=16, prefix_cache=False)
    config = EngineConfig(kv=kv, scheduler=SchedulerConfig(max_num_tokens=48, max_num_seqs=4, max_model_len=96))
    enough = FreeMemory(num_bytes=1 << 30, source="of the host, more than a check takes")
    with patch.object(device_factory, "free_memory", lambda: enough):  # it would ask psutil, which may not be there
        runner, _ = device_factory.load_on_gpu(folder, config, card.device)
    found = _served(runner, (4,) if card.is_gpu else (1,))
    runner.close()
    return found


def _served(runner: DeviceRunner, waves: tuple[int, ...]) -> dict[int, list[int]]:
    """So many requests at a time, one wave after the other, each for some steps: rows rise again where waves do."""
    scheduler = make_scheduler(runner, max_num_tokens=40)
    ids: dict[int, list[int]] = {}
    for count in waves:
        for index in range(count):
            handle = len(ids) + index
            prompt = tuple(range(2 + handle, 12 + handle + 2 * index))
            sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
            scheduler.submit(Request(handle=handle, prompt_ids=prompt, sampling=sampling), 0.0)
        ids |= drive(scheduler, runner).ids
    return ids


@contextmanager
def _warnings(name: str) -> Iterator[list[str]]:
    """What a logger says at least as a warning."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)
