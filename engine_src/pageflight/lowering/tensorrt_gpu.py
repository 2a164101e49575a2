"""The GPU that TensorRT would find, asked from NVIDIA's driver: a build needs no torch for that."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_NAME_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """What caches and engines of one GPU cannot be used without."""

    name: str
    capability: int  # 90 is compute capability 9.0
    driver: int  # the newest CUDA that the driver knows: 13000 is 13.0


def find_gpu(index: int = 0) -> Gpu | None:
    """The GPU of that number among those that this process may use; None without one, or without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor, driver = (ctypes.c_int() for _ in range(4))
    name = ctypes.create_string_buffer(_NAME_BYTES)
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(device), index),
        lambda: cuda.cuDeviceGetName(name, _NAME_BYTES, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
        lambda: cuda.cuDriverGetVersion(ctypes.byref(driver)),
    )
    if any(call() != 0 for call in calls):  # in this order, and none after the first that fails
        return None
    return Gpu(name=name.value.decode(), capability=10 * major.value + minor.value, driver=driver.value)
