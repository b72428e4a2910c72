"""Prometheus' HTTP service discovery: the targets of live runs, as JSON. Answers from the last look, which a thread renews."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from launch.discovery.live import Found
from trainer.errors import UserError, one_line

PATH = "/targets"
REQUEST_S = 10.0
"""Longest that a client may take to ask."""
PATIENCE = 5
"""Looks that may fail in a row before it says that it is not well."""


class Looker:
    """The newest result of a look, renewed every `every_s` seconds. A look that fails leaves what was there."""

    def __init__(self, look: Callable[[], Found], *, every_s: float, say: Callable[[str], None]) -> None:
        self._look, self._every_s, self._say = look, every_s, say
        self._end = threading.Event()
        self._said: set[str] = set()
        self.found: Found | None = None
        self.trouble = ""
        self._thread = threading.Thread(target=self._run, name="looks", daemon=True)

    def __enter__(self) -> "Looker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    @property
    def is_well(self) -> bool:
        return self.found is not None and time.time() - self.found.time < PATIENCE * self._every_s + 60.0

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.found, self.trouble = self._look(), ""
                troubles = list(self.found.skipped)
            except Exception as e:  # storage that is away comes back; Prometheus keeps the targets that it has
                self.trouble = one_line(e)
                troubles = [self.trouble]
            for line in troubles:
                if line not in self._said:
                    self._say(line)
            self._said = set(troubles)
            self._end.wait(self._every_s)


class DiscoveryServer:
    """Listens from the beginning; use as a context manager."""

    def __init__(self, looker: Looker, *, address: str, port: int) -> None:
        """
        Raises:
            UserError: the address or port cannot be had.
        """

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_S

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/-/healthy":
                    self._answer(200 if looker.is_well else 503, "text/plain; charset=utf-8", _health(looker))
                elif path not in (PATH, "/"):
                    self._answer(
                        404, "text/plain; charset=utf-8", f"{PATH} has the targets, /-/healthy says how it goes\n"
                    )
                elif looker.found is None:
                    # an empty list would make Prometheus drop what it has
                    self._answer(503, "text/plain; charset=utf-8", "the first look has not ended\n")
                else:
                    self._answer(200, "application/json", json.dumps(looker.found.groups()))

            def _answer(self, status: int, kind: str, text: str) -> None:
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                """A line a scrape would bury what matters."""

        try:
            self._server = ThreadingHTTPServer((address, port), Handler)
        except (OSError, OverflowError) as e:
            raise UserError(f"--port {port}: cannot listen on {address}:{port} ({one_line(e)}); take another") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(target=self._server.serve_forever, name="server", daemon=True)

    def __enter__(self) -> "DiscoveryServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _health(looker: Looker) -> str:
    lines = [f"last look failed: {looker.trouble}"] if looker.trouble else []
    if (found := looker.found) is not None:
        targets = sum(len(run.targets) for run in found.runs)
        ago = f"{time.time() - found.time:.0f} s ago"
        lines.append(f"{len(found.runs)} live runs with {targets} targets in {found.folders} folders, {ago}")
        lines += [f"skipped: {line}" for line in found.skipped]
    return "".join(f"{line}\n" for line in lines or ["the first look has not ended"])
