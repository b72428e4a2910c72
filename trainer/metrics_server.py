"""Who may read /metrics: prometheus-client's server, with its TLS, and a name and password before its answer. No torch."""

import base64
import binascii
import hmac
import ssl
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIServer

import prometheus_client
from prometheus_client import CollectorRegistry

from trainer.errors import UserError, one_line

_App = Callable[..., Iterable[bytes]]


@dataclass(frozen=True)
class Access:
    certificate: str | None = None
    key: str | None = None
    client_ca: str | None = None
    """PEM files."""
    login: bytes | None = None
    """name:password."""

    def __repr__(self) -> str:
        return "Access(...)"  # it holds a password


OPEN = Access()
PATIENCE_S = 10.0
"""With a peer that says nothing: Prometheus' own limit of a scrape."""


def start(port: int, address: str, registry: CollectorRegistry, access: Access) -> WSGIServer:
    """Answers in a background thread.

    Raises:
        OSError: the address or port cannot be had.
        UserError: certificate and key are no pair, or no PEM.
    """
    options: dict[str, Any] = {}
    if access.certificate:
        options = {"certfile": access.certificate, "keyfile": access.key}
    if access.client_ca:
        options |= {"client_cafile": access.client_ca, "client_auth_required": True}
    # behind a password, the server has nothing to tell until it asks for one
    begins_with = CollectorRegistry() if access.login else registry
    try:
        server, _ = prometheus_client.start_http_server(port, addr=address, registry=begins_with, **options)
    except ssl.SSLError as e:
        raise UserError(f"metrics.tls: {one_line(e)}; certificate and key are a pair of PEM files") from None
    _be_patient_apart(server)
    if access.login:
        server.set_app(_behind(access.login, prometheus_client.make_wsgi_app(registry)))
    return server


def _be_patient_apart(server: WSGIServer) -> None:
    """A peer that connects and says nothing, as a load balancer's check does, holds up its own thread alone, and for a while:
    by default TLS shakes hands in the thread that accepts connections, without a limit."""

    class Handler(server.RequestHandlerClass):  # type: ignore[name-defined,misc]
        timeout = PATIENCE_S

    def handle_error(request: Any, client: Any) -> None:
        """A peer that went away, or speaks no TLS, is no news; anything else is told as the base class does."""
        if not isinstance(sys.exception(), OSError):
            WSGIServer.handle_error(server, request, client)

    server.RequestHandlerClass = Handler
    setattr(server, "handle_error", handle_error)  # noqa: B010 - of this server alone
    listening: Any = server.socket
    if isinstance(listening, ssl.SSLSocket):
        # what it accepts shakes hands upon the first read, which is the handler's
        setattr(listening, "do_handshake_on_connect", False)  # noqa: B010 - typeshed does not know it


def _behind(login: bytes, app: _App) -> _App:
    """Basic authentication (RFC 7617)."""

    def ask(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        found = b""
        with suppress(binascii.Error, ValueError):
            found = base64.b64decode(given, validate=True)
        # in a time that tells nothing of how much of it was right
        if method.lower() == "basic" and hmac.compare_digest(found, login):
            return app(environ, start_response)
        refused = [("WWW-Authenticate", 'Basic realm="metrics", charset="UTF-8"'), ("Content-Type", "text/plain")]
        start_response("401 Unauthorized", refused)
        return [b"a name and a password are needed\n"]

    return ask
