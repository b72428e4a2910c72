"""A server that answers as a DCGM exporter would, from dcgm_exposition.txt; tests change what it says."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

EXPOSITION = Path(__file__).with_name("dcgm_exposition.txt")


@dataclass
class Dcgm:
    port: int
    text: str

    def say(self, field: str, gpu: int, value: float) -> None:
        """From the next scrape on."""
        self.text, count = re.subn(
            rf'^({field}{{gpu="{gpu}",[^}}]*}}) .*$', rf"\g<1> {value}", self.text, flags=re.MULTILINE
        )
        assert count == 1, field


@contextmanager
def dcgm() -> Iterator[Dcgm]:
    found = Dcgm(0, EXPOSITION.read_text())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(found.text.encode())

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.port = server.server_port
        Thread(target=server.serve_forever, daemon=True).start()
        yield found
        server.shutdown()
