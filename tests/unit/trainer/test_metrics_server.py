"""/metrics on real sockets: the next port where one is taken, TLS, and a name with a password."""

import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import pytest

from trainer import metrics_server
from trainer.config import BasicAuthConfig, MetricsConfig, TLSConfig
from trainer.errors import UserError
from trainer.exporter import Exporter
from trainer.metrics_server import Access
from trainer.serving import access_of


def get(url: str, login: str | None = None, context: ssl.SSLContext | None = None) -> tuple[int, str]:
    headers = {} if login is None else {"Authorization": "Basic " + b64encode(login.encode()).decode()}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120, context=context) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()


def test_a_taken_port_makes_way_for_the_next_one() -> None:
    first = Exporter()
    taken = first.serve("127.0.0.1", 0)
    second = Exporter()
    port = second.serve("127.0.0.1", taken, tries=50)
    assert taken < port < taken + 50
    assert get(f"http://127.0.0.1:{port}/metrics")[0] == 200
    with pytest.raises(UserError, match=rf"metrics\.port: cannot listen on 127\.0\.0\.1:{taken} "):
        Exporter().serve("127.0.0.1", taken)
    first.close()
    second.close()


def test_an_address_of_another_machine_is_not_tried_at_fifty_ports() -> None:
    with pytest.raises(UserError, match=r"cannot listen on 192\.0\.2\.1:9400 \("):
        Exporter().serve("192.0.2.1", 9400, tries=50)


def test_who_has_no_password_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("secret word\n")
    config = MetricsConfig(auth=BasicAuthConfig(username="reader", password_file=str(tmp_path / "password")))
    access = access_of(config, {})
    assert "secret" not in repr(access)
    exporter = Exporter()
    url = f"http://127.0.0.1:{exporter.serve('127.0.0.1', 0, access=access)}/metrics"
    for login in (None, "reader:wrong", "other:secret word", "reader:secret word "):
        status, text = get(url, login)
        assert status == 401
        assert "loupe_" not in text
    status, text = get(url, "reader:secret word")
    assert status == 200
    assert "loupe_step " in text
    exporter.close()


def test_a_password_comes_from_the_environment_and_must_be_there() -> None:
    config = MetricsConfig(auth=BasicAuthConfig(username="reader", password_variable="METRICS_PASSWORD"))
    assert access_of(config, {"METRICS_PASSWORD": "word"}) == Access(login=b"reader:word")
    with pytest.raises(UserError, match=r"metrics\.auth\.password_variable: \$METRICS_PASSWORD is empty"):
        access_of(config, {})
    with pytest.raises(ValueError, match="name one of password_file and password_variable"):
        BasicAuthConfig(username="reader")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
        check=True, capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


def test_tls_and_who_must_show_a_certificate(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    exporter, strict = Exporter(), Exporter()
    trusting = ssl.create_default_context(cafile=cert)
    port = exporter.serve("127.0.0.1", 0, access=access_of(MetricsConfig(tls=TLSConfig(certificate=cert, key=key)), {}))
    assert get(f"https://127.0.0.1:{port}/metrics", context=trusting)[0] == 200
    with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
        get(f"https://127.0.0.1:{port}/metrics")

    # who has no certificate is sent away, and the next one is answered
    both = access_of(MetricsConfig(tls=TLSConfig(certificate=cert, key=key, client_ca=cert)), {})
    port = strict.serve("127.0.0.1", 0, access=both)
    with pytest.raises((urllib.error.URLError, OSError)):
        get(f"https://127.0.0.1:{port}/metrics", context=trusting)
    trusting.load_cert_chain(cert, key)
    assert get(f"https://127.0.0.1:{port}/metrics", context=trusting)[0] == 200
    exporter.close()
    strict.close()

    with pytest.raises(UserError, match=r"metrics\.tls\.key: .*gone.*cannot be read"):
        access_of(MetricsConfig(tls=TLSConfig(certificate=cert, key=str(tmp_path / "gone"))), {})
    broken = tmp_path / "broken.pem"
    broken.write_text("no PEM\n")
    with pytest.raises(UserError, match=r"metrics\.tls: "):
        Exporter().serve("127.0.0.1", 0, access=Access(certificate=cert, key=str(broken)))


@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_says_nothing_holds_nobody_up(
    tls: bool, certificate: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics_server, "PATIENCE_S", 1.0)
    cert, key = certificate
    access = Access(certificate=cert, key=key) if tls else Access()
    exporter = Exporter()
    port = exporter.serve("127.0.0.1", 0, access=access)
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    time.sleep(0.2)
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/metrics"
    assert get(url, context=ssl.create_default_context(cafile=cert))[0] == 200
    if tls:  # nor does one that speaks no TLS
        with pytest.raises(OSError):  # noqa: PT011 - whichever the kernel says of a closed connection
            get(f"http://127.0.0.1:{port}/metrics")
    for peer in silent:
        peer.settimeout(120)
        assert peer.recv(1) == b"", "they are let go"
        peer.close()
    assert get(url, context=ssl.create_default_context(cafile=cert))[0] == 200
    exporter.close()
    assert "Traceback" not in capfd.readouterr().err
