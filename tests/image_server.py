"""An HTTP server for tests that has images, and every way to fail that the web has."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOGETHER_S = 20.0


@dataclass
class ImageServer:
    """Paths: those of `images`; /status/CODE; /once/PATH, which fails on the first request; /to/URL, a redirect; /loop; /slow;
    /html; /cut; /endless; /later (503 with Retry-After once); /gzip/PATH, which claims to be compressed; /robots/PATH."""

    port: int
    images: Mapping[str, bytes]
    hits: Counter[str] = field(default_factory=Counter)
    """Requests by path."""
    at_once: int = 0
    most_at_once: int = 0
    together: int = 0
    """So many requests for images must have been there at once before one is answered; not for longer than `TOGETHER_S`."""
    agents: set[str] = field(default_factory=set)

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}/{path}"


@contextmanager
def image_server(images: Mapping[str, bytes]) -> Iterator[ImageServer]:
    lock = threading.Lock()
    state = ImageServer(0, images)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.lstrip("/")
            with lock:
                state.hits[path] += 1
                state.at_once += 1
                state.most_at_once = max(state.most_at_once, state.at_once)
                state.agents.add(self.headers.get("User-Agent", ""))
            try:
                self.route(path)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    state.at_once -= 1

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def route(self, path: str) -> None:
            kind, _, rest = path.partition("/")
            plain = path.partition("?")[0]
            routes: dict[str, Callable[[], None]] = {
                "status": lambda: self.answer(int(rest)),
                "once": lambda: self.answer(500) if state.hits[path] == 1 else self.answer(200, images[rest]),
                "to": lambda: self.answer(302, Location=unquote(rest)),
                "loop": lambda: self.answer(302, Location="/loop"),
                "slow": self.slow,
                "html": lambda: self.answer(200, b"<html>no image</html>" * 100, Content_Type="image/jpeg"),
                "cut": self.cut,
                "endless": self.endless,
                "later": self.later,
                "gzip": lambda: self.answer(200, b"\x1f\x8b" + bytes(100), Content_Encoding="gzip"),
                "robots": lambda: self.answer(200, images[rest], X_Robots_Tag="somebot: noindex, noai"),
            }
            if kind in routes:
                routes[kind]()
            elif plain in images:
                deadline = time.monotonic() + TOGETHER_S
                while state.most_at_once < state.together and time.monotonic() < deadline:
                    time.sleep(0.005)
                if state.most_at_once < state.together:
                    state.together = 0  # they do not come: nobody else waits for them
                time.sleep(0.02)
                self.answer(200, images[plain])
            else:
                self.answer(404)

        def later(self) -> None:
            if state.hits["later"] == 1:
                self.answer(503, Retry_After="1")
            else:
                self.answer(200, next(iter(images.values())))

        def slow(self) -> None:
            time.sleep(3)
            self.answer(200, b"late")

        def cut(self) -> None:
            data = next(iter(images.values()))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True

        def endless(self) -> None:
            """Without a length, and with no end."""
            self.send_response(200)
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"\xff\xd8\xff\xe0")
            for _ in range(200):
                self.wfile.write(bytes(1 << 16))
            self.close_connection = True

    # On all of 127/8, so that a redirect can lead to another address of this machine.
    server = ThreadingHTTPServer(("0.0.0.0", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
