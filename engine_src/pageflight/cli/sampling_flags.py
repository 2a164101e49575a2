"""The options of a request as the command line spells them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from pageflight.core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """What `generate` and `chat` share. Options that are not given are not sent: the server's defaults hold."""

    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None
    top_k: Annotated[int | None, typer.Option(help="Sample from the k most probable tokens.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from the smallest set with this probability.")] = None
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the most probable one.")] = (
        None
    )
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given several times.")] = None
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param", "-p", metavar="NAME=VALUE", help="Any other input of the model, such as -p min_tokens=5."
        ),
    ] = None

    def request(self, prompt: str) -> dict[str, Any]:
        """The inputs of one request. Raises ConfigError for a --param that is not NAME=VALUE."""
        named = {name: getattr(self, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")}
        request = {"text_input": prompt, **{name: value for name, value in named.items() if value is not None}}
        if self.stop:
            request["stop_words"] = self.stop
        for item in self.param or ():
            name, equals, value = item.partition("=")
            if not equals or not name:
                raise ConfigError(f"param={item!r}: write NAME=VALUE")
            try:
                request[name] = json.loads(value)
            except json.JSONDecodeError:
                request[name] = value
        return request
