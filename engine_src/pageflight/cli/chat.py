"""`pageflight chat`: a conversation in the terminal, through the checkpoint's own chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pageflight.cli.console import console
from pageflight.cli.errors import CommandError
from pageflight.cli.flags import takes
from pageflight.cli.generate import DEFAULT_URL, answering, print_answers
from pageflight.cli.inspect_repository import engine_named
from pageflight.cli.sampling_flags import SamplingFlags
from pageflight.core.manifest import EngineManifest
from pageflight.text.chat_template import ChatTemplate
from pageflight.text.tokenizer import Tokenizer


@takes(SamplingFlags, "flags")
def chat(
    repository: Annotated[Path, typer.Argument(help="The repository that is served: its chat template is used.")],
    flags: SamplingFlags,
    url: Annotated[
        str, typer.Option(help="Server to ask: http://HOST:PORT, or grpc://HOST:PORT.", envvar="PAGEFLIGHT_URL")
    ] = DEFAULT_URL,
    model: Annotated[str, typer.Option(help="Model to ask.")] = "ensemble",
    local: Annotated[bool, typer.Option("--local", help="Run the engine right here, without a server.")] = False,
    system: Annotated[str | None, typer.Option(help="System message that opens the conversation.")] = None,
    name: Annotated[str | None, typer.Option(help="Which model of a repository that holds several.")] = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends the conversation, /reset forgets it.

    Examples:

        pageflight chat repositories/mine
        pageflight chat repositories/mine --local --system "Answer in one sentence." --temperature 0.7
    """
    conversation = Conversation(engine_named(repository, name), system)
    with answering(url, repository if local else None, name) as ask:
        while True:
            try:
                said = console.input("[bold]you:[/] ").strip()
            except EOFError:
                said = ""
            if not said:
                return
            if said == "/reset":
                conversation.reset()
                continue
            prompt = conversation.ask(said)
            conversation.answered(print_answers(ask.stream(model, flags.request(prompt))).strip())


class Conversation:
    """Messages so far, and the prompt they make."""

    def __init__(self, engine_dir: Path, system: str | None) -> None:
        """Raises CommandError when the checkpoint has no chat template."""
        folder = engine_dir / "tokenizer"
        special = Tokenizer.load(folder).special
        template = ChatTemplate.load(folder, special.strings)
        manifest = EngineManifest.read(engine_dir)
        if template is None:
            raise CommandError(
                f"{manifest.name} has no chat template: it was not made for conversations; use `pageflight generate`"
            )
        self._template = template
        # The tokenizer of the server adds this token itself; the template's would be a second one.
        self._opening = special.strings.get("bos_token", "") if manifest.add_bos else ""
        self._system = system
        self._messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str) -> str:
        """Add what the user said; the prompt for the answer."""
        self._messages.append({"role": "user", "content": text})
        return self._template.render(self._messages).removeprefix(self._opening)

    def answered(self, text: str) -> None:
        """Add what the model said."""
        self._messages.append({"role": "assistant", "content": text})
