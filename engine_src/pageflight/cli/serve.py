"""`pageflight serve`: tritonserver on a repository, in the foreground."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from pageflight.cli import shared_memory, tritonserver
from pageflight.cli.console import console, output, tell
from pageflight.cli.errors import CommandError, ServerCrash
from pageflight.cli.flags import takes
from pageflight.cli.server_flags import ServerFlags
from pageflight.cli.server_guard import ServerGuard
from pageflight.cli.server_process import WAITING, ServerProcess
from pageflight.cli.watch_flags import WatchFlags
from pageflight.loop.address import remove_leftovers
from pageflight.loop.watch import Watch

STARTS = 3


@takes(ServerFlags, "flags")
@takes(WatchFlags, "watch_flags")
def serve(
    repository: Annotated[Path, typer.Argument(help="Model repository made by `pageflight build`.")],
    flags: ServerFlags,
    watch_flags: WatchFlags,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the command with its environment, and start nothing.")
    ] = False,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="After --: further arguments of tritonserver, as they are.")
    ] = None,
) -> None:
    """Serve a model repository with NVIDIA's tritonserver until Ctrl-C, then let open requests finish.

    The server is the one of $TRITONSERVER, else the one on PATH, else NVIDIA's from the nvidia-pytriton wheel.

    Examples:

        pageflight serve repositories/demo --http-port 9000
        pageflight serve repositories/demo --print-command
        pageflight serve repositories/demo --record run.rec --check-invariants 100
        pageflight serve repositories/demo -- --log-verbose=1
    """
    command = server_command(repository, flags, arguments or (), watch_flags.watch)
    if print_command:
        output.print(shown(command))
        return
    with running_server(command, flags) as server:
        console.print(f"Serving {repository} on {urls(flags)}. Ctrl-C ends it.", highlight=False, soft_wrap=True)
        status = server.wait()
    raise CommandError(f"tritonserver ended by itself with status {status}")


@contextmanager
def running_server(command: tritonserver.ServerCommand, flags: ServerFlags) -> Iterator[ServerProcess]:
    """A server that is ready; drained when the block ends, by Ctrl-C or SIGTERM as well.

    Raises ServerStartError with the reasons when it does not become ready.
    """
    flags.ports.check_free()
    guard = ServerGuard(command, flags)
    with terminated_like_interrupted(), ExitStack() as stack:
        server: ServerProcess | None = None
        try:
            server = _started(guard, flags, stack)
            guard.start(server.pid)
            yield server
        except KeyboardInterrupt:
            stack.close()
            raise typer.Exit(1 if server is not None and server.num_cut_off else 0) from None


def _started(guard: ServerGuard, flags: ServerFlags, stack: ExitStack) -> ServerProcess:
    """A ready server that `stack` will drain. Raises ServerStartError when every try has failed."""
    command, told = guard.command, ""

    def say(words: str) -> None:
        nonlocal told
        status.update(words)
        if not console.is_terminal and WAITING in words and words != told:  # who reads a log sees no status line
            console.print(words, highlight=False, soft_wrap=True)
            told = words

    for attempt in range(1, STARTS + 1):
        server = ServerProcess(command.arguments, command.environment, flags.ports, verbose=flags.verbose)
        try:
            with console.status("Starting tritonserver …") as status:
                server.wait_ready(say)
        except ServerCrash as crash:
            server.kill()
            if attempt == STARTS:
                raise
            # The Python backend of Triton loses a race for its shared memory now and then, most on a busy machine.
            console.print(f"{crash}\nStarting it again.", highlight=False, soft_wrap=True, markup=False)
        except BaseException:
            server.kill()
            raise
        else:
            stack.callback(_drain, server, guard, flags)
            return server
    raise AssertionError("the last attempt returns or raises")


def _drain(server: ServerProcess, guard: ServerGuard, flags: ServerFlags) -> None:
    segments: frozenset[str] = frozenset()
    try:
        guard.stop_reloads()
        segments = shared_memory.segments_of(server.pid)
        server.drain(
            flags.exit_timeout_secs,
            tell,
            before_end=guard.stop,
            is_hopeless=guard.only_corpses_are_left,
        )
    finally:
        guard.stop()
        server.kill()
        shared_memory.remove(segments)
        remove_leftovers()


def server_command(
    repository: Path, flags: ServerFlags, further: Sequence[str], watch: Watch | None = None
) -> tritonserver.ServerCommand:
    """The command line that serves `repository`. Raises CommandError when there is no repository."""
    if not any(repository.glob("*/config.pbtxt")):
        raise CommandError(
            f"{repository} is no model repository; build one: pageflight build CHECKPOINT --repository {repository}"
        )
    command = tritonserver.server_command(
        repository,
        http_port=flags.http_port,
        grpc_port=flags.grpc_port,
        metrics_port=flags.metrics_port,
        host=flags.host,
        exit_timeout_s=flags.exit_timeout_secs,
        further=further,
    )
    return command.with_environment(watch.to_environment()) if watch is not None else command


def shown(command: tritonserver.ServerCommand) -> str:
    """A line for a shell, with the environment it needs."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in sorted(command.added_environment.items())]
    return " ".join([*settings, shlex.join(command.arguments)])


def urls(flags: ServerFlags) -> str:
    host = flags.ports.local_host
    return (
        f"http://{host}:{flags.http_port}, grpc://{host}:{flags.grpc_port},"
        f" metrics http://{host}:{flags.metrics_port}/metrics"
    )


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that one way out serves both."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
