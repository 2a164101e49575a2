"""Every error a client or operator can meet, and the status each becomes on the wire.

One table (`STATUS`) maps classes to Triton's error codes and HTTP statuses; a test proves it complete.
Messages name the option, its value and its limit, and say what to do next where that is known.
"""

from __future__ import annotations

from dataclasses import dataclass


class PageflightError(Exception):
    """Base of all errors meant for people. The message is safe to send to a client."""


class InvalidArgument(PageflightError):
    """A request or option that can never work as it was sent."""

    def __init__(self, option: str, value: object, limit: str) -> None:
        self.option, self.value, self.limit = option, value, limit
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{option}={shown}: {limit}")


class Unsupported(InvalidArgument):
    """A valid option whose feature this build does not have, or a pair that cannot work together."""


class PromptTooLong(InvalidArgument):
    """Prompt, or prompt plus `max_tokens`, does not fit the model or the cache."""


class QueueFull(PageflightError):
    """The waiting queue, or that of one tenant, is at its limit; the client may retry.

    `length` requests with `num_tokens` prompt tokens wait; `limit` counts `unit`. `wait_s` is the estimated time until
    what waits now has been started, None while nothing was measured.
    """

    def __init__(
        self,
        length: int,
        limit: int,
        *,
        unit: str = "requests",
        num_tokens: int = 0,
        wait_s: float | None = None,
        tenant: str | None = None,
    ) -> None:
        self.length, self.limit, self.num_tokens, self.wait_s, self.tenant = length, limit, num_tokens, wait_s, tenant
        queue = "queue" if tenant is None else f"queue of tenant {tenant!r}"
        if unit == "tokens":
            state = f"{num_tokens} prompt tokens waiting in {length} requests, limit {limit} tokens"
        else:
            state = f"{length} requests waiting, limit {limit}; {num_tokens} prompt tokens waiting"
        retry = "later" if wait_s is None else f"later: estimated wait {wait_s:.1f} s"
        super().__init__(f"{queue} is full: {state}; retry {retry}")


class Draining(PageflightError):
    """The server finishes its open requests and takes no new ones."""


class DeadlineExceeded(PageflightError):
    """The request's `timeout_ms` passed before it finished."""


class Cancelled(PageflightError):
    """The client cancelled the request."""


class EngineLost(PageflightError):
    """The engine core died and could not carry the request on."""


class RankLost(PageflightError):
    """A process of a tensor-parallel engine died, or computed something else than the others: the core ends with it.

    `return_code` as `subprocess` has it, where it died without a word.
    """

    def __init__(self, message: str, return_code: int | None = None) -> None:
        self.return_code = return_code
        super().__init__(message)


class RanksMissing(PageflightError):
    """Ranks that others start, on other machines for instance, have not come within `rank_wait_s`."""


class PoisonRequest(PageflightError):
    """The engine core died again and again in steps of this request alone; it is given up so that others go on."""


class StubLost(PageflightError):
    """The server's process that held the request died; the client may send it again."""


class CheckpointError(PageflightError):
    """A checkpoint that cannot be read or served, with the reason."""


class ManifestMismatch(PageflightError):
    """An engine built for another machine, version or format than this runtime."""


class OutOfMemory(PageflightError):
    """A device has not the memory that a step, or the start of an engine, needs."""


class ConfigError(PageflightError):
    """A configuration value that cannot work."""


@dataclass(frozen=True, slots=True)
class ErrorStatus:
    """How one error class appears on the wire: Triton's code name and the HTTP status."""

    triton: str
    http: int


STATUS: dict[type[PageflightError], ErrorStatus] = {
    PageflightError: ErrorStatus("INTERNAL", 500),
    InvalidArgument: ErrorStatus("INVALID_ARG", 400),
    Unsupported: ErrorStatus("INVALID_ARG", 400),
    PromptTooLong: ErrorStatus("INVALID_ARG", 400),
    QueueFull: ErrorStatus("UNAVAILABLE", 503),
    Draining: ErrorStatus("UNAVAILABLE", 503),
    DeadlineExceeded: ErrorStatus("CANCELLED", 499),
    Cancelled: ErrorStatus("CANCELLED", 499),
    EngineLost: ErrorStatus("INTERNAL", 500),
    RankLost: ErrorStatus("INTERNAL", 500),
    RanksMissing: ErrorStatus("UNAVAILABLE", 503),
    PoisonRequest: ErrorStatus("INTERNAL", 500),
    StubLost: ErrorStatus("UNAVAILABLE", 503),
    CheckpointError: ErrorStatus("INVALID_ARG", 400),
    ManifestMismatch: ErrorStatus("INVALID_ARG", 400),
    OutOfMemory: ErrorStatus("UNAVAILABLE", 503),
    ConfigError: ErrorStatus("INVALID_ARG", 400),
}


def status_of(error: BaseException) -> ErrorStatus:
    """The wire status of `error`; anything that is not ours is an internal error."""
    return STATUS[type(error)] if isinstance(error, PageflightError) else STATUS[PageflightError]
