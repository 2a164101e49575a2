"""The twin of the text model for clients that expect one response, for which Triton refuses decoupled models.

Its answers come through the response sender too, so requests are in flight together although none streams.
"""

from __future__ import annotations

from pageflight.backend import text

__all__ = ["TritonPythonModel"]


class TritonPythonModel(text.TritonPythonModel):
    """Triton's interface to a `TextModel` that answers each request once; not decoupled."""

    _may_stream = False
