"""The errors of the command line itself; what the product raises is in `core.errors`."""

from __future__ import annotations


class CommandError(Exception):
    """Ends a command with one readable line and exit status 1."""


class ServerError(CommandError):
    """The server refused the request, failed, or cannot be reached."""


class ServerStartError(CommandError):
    """tritonserver did not become ready; the message carries its reasons."""


class ServerCrash(ServerStartError):
    """tritonserver was ended by a signal while it started: its own fault, so that another try may well succeed."""
