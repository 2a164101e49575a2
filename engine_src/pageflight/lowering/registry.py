"""Lowerings by name; each is imported when it is asked for, so that nobody pays for a framework they do not use."""

from __future__ import annotations

import importlib

from pageflight.core.errors import ConfigError
from pageflight.lowering.base import Lowering

_CLASSES = {
    "openvino": ("pageflight.lowering.openvino_lowering", "OpenVinoLowering", "pageflight"),
    "tensorrt": ("pageflight.lowering.tensorrt_lowering", "TensorRtLowering", "pageflight[tensorrt]"),
    "torch": ("pageflight.lowering.torch_lowering", "TorchLowering", "pageflight[gpu]"),
}

NAMES = tuple(sorted(_CLASSES))


def get(name: str, **settings: object) -> Lowering:
    """The lowering called `name`, made with `settings`.

    Raises ConfigError for an unknown name and for a framework that is not installed.
    """
    if name not in _CLASSES:
        raise ConfigError(f"lowering={name!r}: supported are {', '.join(NAMES)}")
    module, attribute, package = _CLASSES[name]
    try:
        lowering: Lowering = getattr(importlib.import_module(module), attribute)(**settings)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pageflight"):
            raise
        raise ConfigError(f"lowering={name!r} needs {error.name}, which is not installed; install {package}") from None
    return lowering
