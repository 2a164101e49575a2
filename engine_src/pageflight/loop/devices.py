"""How a core gets the devices of its instance: by its environment, and by the cores that its process starts on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError

_VISIBLE = "CUDA_VISIBLE_DEVICES"


def environment_of(devices: DeviceSet, environment: Mapping[str, str]) -> dict[str, str]:
    """What a core on `devices` has otherwise in its environment. GPUs count among those that the server sees: where
    that is limited already, by numbers, UUIDs or MIG names, the n-th of these. Raises ConfigError for one too many."""
    if devices.kind == "any":
        return {}
    if devices.kind == "cpu":
        return {_VISIBLE: ""}
    seen = environment.get(_VISIBLE)
    if seen is None:
        return {_VISIBLE: ",".join(map(str, devices.numbers))}
    names = [name.strip() for name in seen.split(",") if name.strip()]
    missing = [number for number in devices.numbers if number >= len(names)]
    if missing:
        raise ConfigError(f"gpu{missing[0]}: {_VISIBLE}={seen!r} of the server shows it {len(names)} GPUs only")
    return {_VISIBLE: ",".join(names[number] for number in devices.numbers)}


def cores_of(devices: DeviceSet) -> frozenset[int] | None:
    """The cores that a core process is kept on; None leaves it all. Raises ConfigError for cores that this process may
    not use, or the machine does not have."""
    if devices.kind != "cpu" or not devices.numbers:
        return None
    usable = os.sched_getaffinity(0)
    missing = sorted(set(devices.numbers) - usable)
    if missing:
        own = DeviceSet("cpu", tuple(sorted(usable)))
        raise ConfigError(f"{devices}: there is no core {missing[0]} for this server, which has {own}")
    return frozenset(devices.numbers)


@contextmanager
def on_cores(cores: frozenset[int] | None) -> Iterator[None]:
    """What this thread starts within the block runs on `cores`, from its first instruction: thread pools of libraries
    are made at import and keep what they find."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
