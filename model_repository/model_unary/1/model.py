"""Loaded by Triton's Python backend; the model itself is part of the installed package."""

from pageflight.backend.unary import TritonPythonModel

__all__ = ["TritonPythonModel"]
