"""A core has the devices of its instance, and no others."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest
from front_harness import FAST, NumberText, generation, run

from pageflight.core.devices import DeviceSet
from pageflight.core.errors import ConfigError
from pageflight.loop.address import private_address
from pageflight.loop.devices import cores_of, environment_of
from pageflight.loop.front import Front
from pageflight.loop.local import make_supervisor
from pageflight.loop.observer import SilentObserver


@pytest.mark.parametrize(
    ("devices", "server", "core"),
    [
        ("gpu0", None, "0"),
        ("gpu2,3", None, "2,3"),
        ("gpu1", "4,6", "6"),
        ("gpu0,1", "GPU-aa, MIG-bb,GPU-cc", "GPU-aa,MIG-bb"),
        ("cpu", "0,1", ""),
        ("cpu:0", None, ""),
    ],
)
def test_gpus_count_among_those_of_the_server(devices: str, server: str | None, core: str) -> None:
    """Two servers with a GPU each, by CUDA_VISIBLE_DEVICES: both cores went to the first one."""
    environment = {} if server is None else {"CUDA_VISIBLE_DEVICES": server}
    assert environment_of(DeviceSet.parse(devices), environment) == {"CUDA_VISIBLE_DEVICES": core}


def test_instances_without_devices_see_what_the_server_sees() -> None:
    assert environment_of(DeviceSet(), {"CUDA_VISIBLE_DEVICES": "3"}) == {} and cores_of(DeviceSet()) is None


@pytest.mark.parametrize("devices", ["gpu2", "gpu0,2"])
def test_a_gpu_that_the_server_does_not_see_is_refused(devices: str) -> None:
    with pytest.raises(ConfigError, match="gpu2: CUDA_VISIBLE_DEVICES='0,1' of the server shows it 2 GPUs only"):
        environment_of(DeviceSet.parse(devices), {"CUDA_VISIBLE_DEVICES": "0,1"})


def test_a_core_that_the_machine_does_not_have_is_refused() -> None:
    """The kernel takes what is left of a set of cores; the second instance ran on the cores of the first."""
    with pytest.raises(ConfigError, match="cpu:0,4000: there is no core 4000"):
        make_supervisor(msgspec.structs.replace(FAST, devices=DeviceSet("cpu", (0, 4000))), private_address())


def test_every_thread_of_a_core_is_on_its_cores_and_its_starter_is_not() -> None:
    """Pools of numpy and OpenVINO keep the cores that they find at import: setting them later moved one thread."""
    own = max(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    address = private_address()
    supervisor = make_supervisor(msgspec.structs.replace(FAST, devices=DeviceSet("cpu", (own,))), address)
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), SilentObserver())
        front.wait_ready(30)
        run(front, generation())
        tasks = Path(f"/proc/{supervisor.status.core_pid}/task").iterdir()
        assert {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks} == {frozenset({own})}
        front.close(0.0)
    finally:
        supervisor.close(1.0)
    threads = [thread.native_id for thread in threading.enumerate() if thread.native_id is not None]
    assert all(os.sched_getaffinity(thread) == before for thread in threads)
