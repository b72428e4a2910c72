"""An HTTP proxy of the tests' own that stands before a real server and spoils its answers: the network's bad days."""

import http.client
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length", "date", "server"}


@dataclass
class Fault:
    """What happens to requests of these methods whose path contains `part`; a query belongs to the path."""

    kind: Literal["503", "slow", "late", "held", "hang", "cut", "flip", "403"]
    part: str = ".mds"
    times: int = 1 << 30
    """So often; then the answers are right."""
    amount: float = 0.0
    """slow: bytes a second; late: seconds before the request goes on to the server. A held one does when released."""
    methods: tuple[str, ...] = ("GET",)
    every: int = 1
    """Of so many requests, to the first."""
    asked: int = field(default=0, init=False)
    happened: int = field(default=0, init=False)
    """How often it has happened."""


class Proxy:
    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.faults: list[Fault] = []
        self.released = threading.Event()
        self.requests: list[tuple[str, str]] = []
        """(method, path) of all."""
        self.answered = 0
        """Requests that the server has answered."""
        self.bytes_out = 0
        """Of the bodies of all answers, those that were spoilt included."""
        self._lock = threading.Lock()

    def count_answer(self) -> None:
        with self._lock:
            self.answered += 1

    def count_bytes(self, size: int) -> None:
        with self._lock:
            self.bytes_out += size

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for fault in self.faults:
                if method in fault.methods and fault.part in path and fault.happened < fault.times:
                    fault.asked += 1
                    if (fault.asked - 1) % fault.every == 0:
                        fault.happened += 1
                        return fault
        return None


@contextmanager
def faulty_proxy(target: str) -> Iterator[Proxy]:
    """A proxy to the server at URL `target`, while within."""
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(size) if size else b""
            fault = proxy.fault_of(self.command, self.path)
            if fault and fault.kind in ("503", "403"):
                code = "ServiceUnavailable" if fault.kind == "503" else "AccessDenied"
                self._answer(int(fault.kind), {}, f"<Error><Code>{code}</Code></Error>".encode())
                return
            if fault and fault.kind == "hang":
                proxy.released.wait(120)
                self.close_connection = True
                return
            if fault and fault.kind == "late":
                time.sleep(fault.amount)
            if fault and fault.kind == "held":
                proxy.released.wait(120)
            upstream = http.client.HTTPConnection(host, timeout=60)
            try:
                upstream.request(self.command, self.path, body, dict(self.headers.items()))
                answer = upstream.getresponse()
                data = answer.read()
                headers = {k: v for k, v in answer.getheaders() if k.lower() not in _HOP_BY_HOP}
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            finally:
                upstream.close()
            proxy.count_answer()
            self._answer(answer.status, headers, data, fault, length)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def _answer(
            self,
            status: int,
            headers: dict[str, str],
            data: bytes,
            fault: Fault | None = None,
            length: str | None = None,
        ) -> None:
            proxy.count_bytes(len(data))
            self.send_response_only(status)
            for name, value in headers.items():
                if not name.lower().startswith("x-amz-checksum"):  # clients would find damage before we do
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            if fault and fault.kind == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif fault and fault.kind == "flip":
                middle = len(data) // 2
                self.wfile.write(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
            elif fault and fault.kind == "slow":
                step = max(1, int(fault.amount / 20))
                for start in range(0, len(data), step):
                    self.wfile.write(data[start : start + step])
                    time.sleep(0.05)
            else:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Nothing to the tests' output."""

        def handle(self) -> None:
            try:
                super().handle()
            except ConnectionError:  # whoever asked has gone
                self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy = Proxy(server.server_port)
    thread = threading.Thread(target=server.serve_forever, name="proxy", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.released.set()
        server.shutdown()
        server.server_close()
