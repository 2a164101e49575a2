"""The options of a server as the command line spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from pageflight.cli.server_process import Ports

_PANEL = "Server"
_DEFAULTS = Ports()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFlags:
    """What `serve` and `up` share."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; 127.0.0.1 for this machine only.", rich_help_panel=_PANEL)
    ] = _DEFAULTS.host
    http_port: Annotated[int, typer.Option(help="HTTP.", min=1, max=65535, rich_help_panel=_PANEL)] = _DEFAULTS.http
    grpc_port: Annotated[int, typer.Option(help="gRPC.", min=1, max=65535, rich_help_panel=_PANEL)] = _DEFAULTS.grpc
    metrics_port: Annotated[int, typer.Option(help="Prometheus metrics.", min=1, max=65535, rich_help_panel=_PANEL)] = (
        8002
    )
    exit_timeout_secs: Annotated[
        int, typer.Option(help="Seconds that open requests get to finish at the end.", min=0, rich_help_panel=_PANEL)
    ] = 30
    watchdog: Annotated[bool, typer.Option(help="Load models again whose process dies.", rich_help_panel=_PANEL)] = True
    restart_stuck_after: Annotated[
        float,
        typer.Option(
            help="Seconds without a sign of life after which a model's process is killed and started again; 0: never.",
            min=0,
            rich_help_panel=_PANEL,
        ),
    ] = 0.0
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the whole log of tritonserver.", rich_help_panel=_PANEL)
    ] = False

    @property
    def ports(self) -> Ports:
        return Ports(host=self.host, http=self.http_port, grpc=self.grpc_port, metrics=self.metrics_port)
