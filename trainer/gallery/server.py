"""The gallery on a port of this machine: the page, its pictures, NiceGUI's own files, and nothing else."""

import asyncio
import contextlib
import ipaddress
import socket
import warnings
from collections.abc import AsyncIterator, Callable

import uvicorn
from fastapi import FastAPI, HTTPException, Response
from nicegui import core, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from trainer.errors import UserError, one_line
from trainer.gallery.gallery import Gallery
from trainer.gallery.page import CSS, Page

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
CONNECT_S = 60
"""Seconds that a browser has from the page to its socket."""
END_S = 5
"""Seconds that open connections have when the server ends."""


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listening(host: str, port: int) -> socket.socket:
    """
    Raises:
        UserError: the address cannot be taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        # at once, so that no other process takes it while the models are read
        found.listen()
    except OSError as e:
        found.close()
        raise UserError(f"--port: {host}:{port} cannot be taken ({one_line(e)}); give another, or 0 for any") from None
    return found


def server_of(
    gallery: Gallery, *, only_loopback: bool, on_ready: Callable[[], object] = lambda: None
) -> uvicorn.Server:
    """Not yet running; once a process. `on_ready`: called when it takes requests.

    Args:
        only_loopback: refuse requests by other names than this machine's own: a web page elsewhere may have its name
            point here.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(gallery.follow())
        # it never ends by itself: what ends it is told in the log
        following.add_done_callback(lambda task: task.cancelled() or task.result())
        on_ready()
        yield
        following.cancel()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    if only_loopback:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK), www_redirect=False)

    @app.get("/picture/{name}.png")
    def picture(name: str) -> Response:
        data = gallery.png(name)
        if data is None:
            raise HTTPException(404, "drawn too long ago, or never")
        return Response(data, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})

    @ui.page("/")
    async def page() -> None:
        ui.add_css(CSS)
        # what is typed before the socket is open would be lost
        await ui.context.client.connected(CONNECT_S)
        if not ui.context.client.is_deleted:
            Page(gallery)

    # its own pages alone: NiceGUI's default lets those of any site open the socket
    core.sio.eio.cors_allowed_origins = None
    # to find its server it looks at all objects, torch's deprecated ones among them
    warnings.filterwarnings("ignore", message=".*reduce_op", category=FutureWarning)
    ui.run_with(app, title="Loupe gallery", dark=None, tailwind=False, show_welcome_message=False)
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=END_S))
