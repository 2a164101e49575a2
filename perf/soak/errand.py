"""What one client does once: a question, how it is sent, and how the client means it to end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

Option = bool | int | float | str | tuple[str, ...]


class Via(str, Enum):
    """The way to the server."""

    GRPC = "grpc"  # ModelStreamInfer
    SSE = "sse"  # generate_stream
    HTTP = "http"  # generate: one response


class Target(str, Enum):
    """The model that is asked; its name depends on the checkpoint's."""

    TEXT = "text"
    UNARY = "unary"
    ENSEMBLE = "ensemble"
    ENGINE = "engine"

    def model(self, name: str) -> str:
        return {Target.TEXT: name, Target.UNARY: f"{name}_unary"}.get(self, self.value)

    def steps(self, name: str) -> frozenset[str]:
        """The models whose processes a request to this one passes through."""
        if self is Target.ENSEMBLE:
            return frozenset(("preprocessing", "engine", "ensemble"))
        return frozenset((self.model(name),))


class Ending(str, Enum):
    """What the client does after so many responses."""

    WAIT = "wait"  # for the last response
    CANCEL = "cancel"  # the gRPC call
    STOP = "stop"  # by TensorRT-LLM's `stop` tensor, on another stream
    DISCONNECT = "disconnect"  # closes its connection, without a word


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A question: the same one has the same answer, whatever else the server does."""

    prompt: str | tuple[int, ...]  # token ids for `engine`
    max_tokens: int
    options: tuple[tuple[str, Option], ...] = ()

    def option(self, name: str, default: Option) -> Option:
        return dict(self.options).get(name, default)

    @property
    def num_sequences(self) -> int:
        return int(self.option("num_return_sequences", 1))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A bad request and how it has to be refused."""

    name: str
    via: Via
    target: Target
    body: bytes = b""  # of HTTP
    values: tuple[tuple[str, Option | tuple[int, ...]], ...] = ()  # tensors of gRPC
    method: str = "generate"
    expected: str  # part of the message
    statuses: frozenset[int] = frozenset((400,))  # of HTTP; a gRPC stream gives errors no status
    model: str = ""  # instead of the target's


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One request of one client."""

    number: int
    via: Via
    target: Target
    ask: Ask
    ending: Ending = Ending.WAIT
    after: int = 0  # responses before an ending that is not WAIT
    fault: Fault | None = None

    @property
    def label(self) -> str:
        """Names it in reports."""
        what = f"bad input {self.fault.name}" if self.fault is not None else self.ending.value
        return f"request {self.number} ({self.via.value} to {self.target.value}, {what})"
