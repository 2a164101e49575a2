"""Loaded by Triton's Python backend; the model itself is part of the installed package."""

from pageflight.backend.preprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
