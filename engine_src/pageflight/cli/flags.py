"""Groups of options that several commands share: a dataclass of typer options, spliced into a signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

Result = TypeVar("Result")


def takes(group: type[Any], parameter: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Replace the argument `parameter` of a command, of dataclass type `group`, by one option per field of it."""

    def decorate(command: Callable[..., Result]) -> Callable[..., Result]:
        hints = get_type_hints(group, include_extras=True)
        keyword_only = inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(
                field.name,
                keyword_only,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(group)
        ]
        own = [
            item.replace(kind=keyword_only)
            for item in inspect.signature(command, eval_str=True).parameters.values()
            if item.name != parameter
        ]

        def call(**values: Any) -> Result:
            chosen = group(**{field.name: values.pop(field.name) for field in fields(group)})
            return command(**values, **{parameter: chosen})

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        call.__annotations__ = {item.name: item.annotation for item in [*own, *options]}
        return call

    return decorate
