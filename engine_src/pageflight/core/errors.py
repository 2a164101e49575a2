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
    """The waiting queue is at its limit; the client may retry."""

    def __init__(self, length: int, limit: int) -> None:
        super().__init__(f"queue is full: {length} requests waiting, limit {limit}; retry later")


class Draining(PageflightError):
    """The server finishes its open requests and takes no new ones."""


class DeadlineExceeded(PageflightError):
    """The request's `timeout_ms` passed before it finished."""


class Cancelled(PageflightError):
    """The client cancelled the request."""


class EngineLost(PageflightError):
    """The engine core died and could not carry the request on."""


class CheckpointError(PageflightError):
    """A checkpoint that cannot be read or served, with the reason."""


class ManifestMismatch(PageflightError):
    """An engine built for another machine, version or format than this runtime."""


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
    CheckpointError: ErrorStatus("INVALID_ARG", 400),
    ManifestMismatch: ErrorStatus("INVALID_ARG", 400),
    ConfigError: ErrorStatus("INVALID_ARG", 400),
}


def status_of(error: BaseException) -> ErrorStatus:
    """The wire status of `error`; anything that is not ours is an internal error."""
    return STATUS[type(error)] if isinstance(error, PageflightError) else STATUS[PageflightError]
