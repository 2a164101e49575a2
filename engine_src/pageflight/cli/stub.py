"""The Python backend's stub program, made fit for NumPy 2.

The stubs of the nvidia-pytriton wheel are built with pybind11 2.10, which reads an array's item size where NumPy 1 kept
it (`PyArray_Descr.elsize`, at byte 32). NumPy 2 moved it to byte 40 and keeps flags in its old place, so every input
array arrives as copies of its first item, and every output is empty or cut. The item size is read in five places of the
program, each an instruction whose displacement byte is that offset: in the copy that is made for this machine anyway,
those five bytes are changed. A stub that does not look exactly so is left alone where it needs nothing, or refused.
"""

from __future__ import annotations

import re
from importlib.metadata import version

from pageflight.core.errors import ConfigError

_OLD_OFFSET, _NEW_OFFSET = b"\x20", b"\x28"
_NUM_BYTE_SIZES = 4
# movslq OFFSET(%rax),%rax; imul %rdx,%rax; mov %rax,0x68(%rbx): `byte_size_ = array.nbytes()` in PbTensor
_BYTE_SIZE = (b"\x48\x63\x40", b"\x48\x0f\xaf\xc2\x48\x89\x43\x68")
# mov (%rsi),%rax; mov OFFSET(%rax),%eax; mov %eax,-N(%rbp): the strides in pybind11::array's constructor
_STRIDES = (b"\x48\x8b\x06\x8b\x40", rb"\x89(?:\x45[\x80-\xff]|\x85..\xff\xff)")


def adapt_stub(program: bytes, numpy_version: str | None = None) -> bytes:
    """The stub's program for `numpy_version` (default: the installed one).

    Raises ConfigError for a stub that needs the change and does not have the known places.
    """
    if int((numpy_version or version("numpy")).split(".")[0]) < 2:
        return program
    byte_size = re.compile(re.escape(_BYTE_SIZE[0]) + b"(" + re.escape(_OLD_OFFSET) + b")" + re.escape(_BYTE_SIZE[1]))
    strides = re.compile(re.escape(_STRIDES[0]) + b"(" + re.escape(_OLD_OFFSET) + b")" + _STRIDES[1], re.DOTALL)
    places = [match.start(1) for match in byte_size.finditer(program)]
    if not places:
        return program  # built with a pybind11 that knows NumPy 2
    others = [match.start(1) for match in strides.finditer(program)]
    if len(places) != _NUM_BYTE_SIZES or len(others) != 1:
        raise ConfigError(
            f"the Python backend's stub of this tritonserver does not work with NumPy 2 and is an unknown build"
            f" ({len(places)} and {len(others)} known places instead of {_NUM_BYTE_SIZES} and 1);"
            " install numpy<2 or the tested nvidia-pytriton"
        )
    adapted = bytearray(program)
    for place in (*places, *others):
        adapted[place : place + 1] = _NEW_OFFSET
    return bytes(adapted)
