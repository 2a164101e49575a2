"""Chat templates as checkpoints bring them: Jinja in a sandbox, with what `transformers` offers to templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pageflight.core.errors import CheckpointError, InvalidArgument
from pageflight.text.tokenizer import read_json

DEFAULT = "default"
WITH_TOOLS = "tool_use"


class ChatTemplate:
    """The named templates of one checkpoint; `default` is the one used unless another is asked for."""

    def __init__(self, sources: Mapping[str, str], special_strings: Mapping[str, str]) -> None:
        """Compiles every template. Raises CheckpointError when one is not valid Jinja."""
        environment = _environment()
        self._templates: dict[str, Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = environment.from_string(source)
            except TemplateError as error:
                raise CheckpointError(f"chat template {name!r} is not valid: {error}") from None
        self._special_strings = dict(special_strings)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._templates)

    @classmethod
    def load(cls, folder: Path, special_strings: Mapping[str, str]) -> ChatTemplate | None:
        """The templates beside a tokenizer (`chat_template.jinja`, `additional_chat_templates/`, or the entry of
        `tokenizer_config.json`); None when there are none."""
        sources: dict[str, str] = {}
        entry = read_json(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(entry, str):
            sources[DEFAULT] = entry
        elif isinstance(entry, list):
            sources.update({str(item["name"]): str(item["template"]) for item in entry})
        single = folder / "chat_template.jinja"
        if single.is_file():
            sources[DEFAULT] = single.read_text(encoding="utf-8")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
        return cls(sources, special_strings) if sources else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        name: str | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`. Its special tokens are in the text: encode it without adding more.

        Raises InvalidArgument when there is no such template or the template refuses the messages.
        """
        if name is None:
            name = WITH_TOOLS if tools and WITH_TOOLS in self._templates else DEFAULT
        template = self._templates.get(name)
        if template is None:
            raise InvalidArgument("chat_template", name, f"this checkpoint has {', '.join(self._templates)}")
        values: dict[str, Any] = {
            **self._special_strings,
            **variables,
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return template.render(values)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise InvalidArgument("messages", messages, f"the chat template refuses them: {error}") from None


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's tokens for training; here it only renders."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it so)

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which would change prompts.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
