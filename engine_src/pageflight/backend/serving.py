"""Answering requests at once, each with a response or a typed error."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from pageflight.backend import triton
from pageflight.core.errors import PageflightError

log = logging.getLogger(__name__)


def answer_each(
    requests: Sequence[triton.TritonRequest],
    answer: Callable[[triton.TritonRequest], list[triton.TritonTensor]],
) -> list[triton.TritonResponse]:
    """One response per request; what goes wrong with one is its own. No traceback leaves the process."""
    responses = []
    for request in requests:
        try:
            responses.append(triton.response(answer(request)))
        except PageflightError as error:
            responses.append(triton.error_response(error))
        except Exception:
            log.exception("request %r failed", request.request_id())
            failure = PageflightError("this request failed in the server; its log has the reason")
            responses.append(triton.error_response(failure))
    return responses
