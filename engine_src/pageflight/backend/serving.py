"""Answering requests at once, each with a response or a typed error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pageflight.backend import triton
from pageflight.core.errors import PageflightError

log = logging.getLogger(__name__)


def answer_each(
    requests: Sequence[triton.TritonRequest],
    answer: Callable[[triton.TritonRequest], list[triton.TritonTensor] | None],
) -> list[triton.TritonResponse | None]:
    """One response per request; what goes wrong with one is its own. No traceback leaves the process.

    None for a request that `answer` has answered itself, for which it returns None.
    """
    responses: list[triton.TritonResponse | None] = []
    for request in requests:
        try:
            tensors = answer(request)
            responses.append(None if tensors is None else triton.response(tensors))
        except PageflightError as error:
            responses.append(triton.error_response(error))
        except Exception:
            log.exception("request %r failed", request.request_id())
            failure = PageflightError("this request failed in the server; its log has the reason")
            responses.append(triton.error_response(failure))
    return responses
