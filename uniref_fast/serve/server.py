"""uvicorn's server with a graceful stop: running edits finish, and new ones are refused meanwhile."""

from __future__ import annotations

import signal
from types import FrameType

import uvicorn

from uniref_fast.progress import announce
from uniref_fast.serve.app import create_app
from uniref_fast.serve.service import EditService

__all__ = ["Server"]

STALLED_SECONDS = 30
"""Seconds that a stopping server waits for clients which do not read their responses."""


class Server(uvicorn.Server):
    """Server of a service, which stops after a signal as soon as no edit is left, and when the engine has failed.

    Args:
        service: The service.
    """

    def __init__(self, service: EditService) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=STALLED_SECONDS,
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new edits after the first signal; stop at once after the second one."""
        if self._service.is_draining:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self._service.is_draining = True
        active = self._service.active
        running = "the server stops after its running edits have ended" if active else "the server stops"
        announce(f"{signal.Signals(sig).name}: {running}; send the signal again to stop at once")

    async def on_tick(self, counter: int) -> bool:
        """Do what has to be done ten times in a second."""
        if (self._service.is_draining and not self._service.active) or self._service.engine.stats().has_failed:
            self.should_exit = True
        return await super().on_tick(counter)
