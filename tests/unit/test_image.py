"""What `make image` hands to a build, and what `make image-test` finds in layers."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ops.image.layers import read_image
from ops.image.pip_settings import for_build, parse

ROOT = Path(__file__).resolve().parents[2]
LABELS = {f"org.opencontainers.image.{n}": "x" for n in ("title", "version", "revision", "licenses", "base.name")}
KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + b"b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ\n" * 4


def entry(name: str, *, mode: int = 0o644, uid: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode, member.uid, member.type = mode, uid, kind
    return member


def archive(folder: Path, *layers: list[tuple[tarfile.TarInfo, bytes]], **settings: object) -> Path:
    """As `docker save` writes it; each layer's step is named by its number."""
    path = folder / "image.tar"
    config = {
        "config": {"User": "1000:1000", "Labels": LABELS, "Env": ["A=b"], **settings},
        "history": [
            {"created_by": "ENV A=b", "empty_layer": True},
            *({"created_by": f"RUN /bin/sh -c step {i} # buildkit"} for i in range(len(layers))),
        ],
    }
    with tarfile.open(path, "w") as tar:
        files = {"config.json": json.dumps(config).encode()}
        for number, members in enumerate(layers):
            layer = io.BytesIO()
            with tarfile.open(fileobj=layer, mode="w") as inner:
                for member, content in members:
                    member.size = len(content)
                    inner.addfile(member, io.BytesIO(content))
            files[f"{number}.tar"] = layer.getvalue()
        manifest = [{"Config": "config.json", "Layers": [f"{i}.tar" for i in range(len(layers))]}]
        files["manifest.json"] = json.dumps(manifest).encode()
        for name, content in files.items():
            member = entry(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


CLEAN = [
    (entry("tmp", mode=0o1777, kind=tarfile.DIRTYPE), b""),
    (entry("usr/bin/python3", mode=0o777, kind=tarfile.SYMTYPE), b""),
    (entry("opt/venv/lib/certifi/cacert.pem"), b"-----BEGIN CERTIFICATE-----\nMIID\n"),
    (entry("opt/venv/lib/botocore/credentials.py"), b"password = None"),
    (entry("opt/venv/lib/botocore/examples.json"), b'{"AccessKeyId": "AKIAIOSFODNN7EXAMPLE"}'),
    (entry("opt/loupe/README.md"), b"see https://user@host/x"),
    # left by the mount of a build secret, which itself is in no layer
    (entry("run/secrets/pip"), b""),
    (entry("opt/.wh.old"), b""),
    # Debian's group for it
    (entry("usr/local/lib", mode=0o2775, kind=tarfile.DIRTYPE), b""),
    (entry("home/loupe/notes", uid=1000), b"x"),
]


def test_layers_are_measured_by_the_step_that_made_them(tmp_path: Path) -> None:
    image = read_image(archive(tmp_path, CLEAN, [(entry("opt/a"), b"12345"), (entry("opt/b"), b"678")]))
    assert [(x.made_by, x.num_files, x.num_bytes) for x in image.layers][1] == ("step 1", 2, 8)
    assert image.findings == ()
    assert [x.findings for x in image.layers] == [(), ()]


@pytest.mark.parametrize(
    ("member", "content", "found"),
    [
        (entry("root/.cache/pip/http/0/1"), b"x", "a cache"),
        (entry("./var/cache/apt/archives/gcc_12_amd64.deb"), b"x", "a cache"),
        (entry("var/lib/apt/lists/debian_main_Packages"), b"x", "a cache"),
        (entry("opt/loupe/.git/config"), b"x", "version control"),
        (entry("etc/pip.conf"), b"x", "looks like a secret"),
        (entry("tmp/.aws/credentials"), b"x", "looks like a secret"),
        (entry("run/secrets/pip"), b"x", "looks like a secret"),
        (entry("opt/loupe/trainer/deploy.key"), KEY, "a key or a password"),
        (entry("etc/apt/sources.list"), b"deb https://me:hunter2@host/debian", "a key or a password"),
        (entry("opt/loupe/.env.local"), b"x", "looks like a secret"),
        (entry("opt/loupe/settings.json"), b'"AKIAQ3EGUFAKEKEY1234"', "a key or a password"),
        (entry("opt/loupe/launch/cli.py", mode=0o666), b"x", "anyone may write"),
        (entry("opt/loupe/launch/cli.py", mode=0o602), b"x", "anyone may write"),
        (entry("opt/loupe", mode=0o777, kind=tarfile.DIRTYPE), b"", "anyone may write"),
        (entry("opt/venv/bin/loupe", uid=1000), b"x", "belongs to user 1000"),
    ],
)
def test_what_has_no_business_in_a_layer_is_found(
    tmp_path: Path, member: tarfile.TarInfo, content: bytes, found: str
) -> None:
    path = archive(tmp_path, [(member, content)], CLEAN)
    first, second = read_image(path).layers
    assert len(first.findings) == 1
    assert found in first.findings[0]
    assert member.name.removeprefix("./") in first.findings[0]
    assert second.findings == ()
    # of the base, it is the base's maker who has to mend it
    assert read_image(path, num_base_layers=1).layers[0].findings == ()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"User": "loupe"}, "'loupe'"),
        ({"User": ""}, "'root'"),
        ({"User": "0"}, "'0'"),
        ({"Env": ["PIP_INDEX_URL=https://me:hunter2@host/simple"]}, "password"),
        ({"Labels": {**LABELS, "org.opencontainers.image.revision": ""}}, "revision"),
    ],
)
def test_an_image_s_settings_are_looked_through(tmp_path: Path, settings: dict[str, object], found: str) -> None:
    (said,) = read_image(archive(tmp_path, CLEAN, **settings)).findings
    assert found in said


def test_pip_s_settings_the_nearest_one_stands() -> None:
    listing = (
        "global.index-url='https://far/simple'\n"
        ":env:.index-url='https://me:pass@near/simple'\n"
        "install.timeout='9'\nglobal.timeout='5'\n"
        "list.format='columns'\nglobal.find-links='/opt/wheels https://host/wheels'\n"
    )
    settings = parse(listing)
    assert settings["index-url"] == "https://me:pass@near/simple"
    assert settings["timeout"] == "9"
    kept, left_out = for_build(settings)
    assert kept == {"index-url": "https://me:pass@near/simple", "timeout": "9", "find-links": "https://host/wheels"}
    assert left_out == ["/opt/wheels"]


def test_pip_s_settings_as_files_that_only_their_owner_reads(tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.write_text("certificates")
    url = "https://me:pa%24s@host/simple"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env = {**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "PIP_CERT": str(ca)}
    program = [sys.executable, str(ROOT / "ops/image/pip_settings.py"), str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    said = subprocess.run(program, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "host" not in said.stdout + said.stderr
    written = tmp_path / "out" / "pip.conf"
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in written.parent.iterdir()} == {
        "pip.conf": "0o600", "ca.pem": "0o600", "wheels": "0o700",
    }  # fmt: skip
    assert (written.parent / "ca.pem").read_text() == "certificates"
    # read as pip in the build reads it
    read = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], env={**clean, "PIP_CONFIG_FILE": str(written)},
        capture_output=True, text=True, timeout=60, check=True,
    ).stdout  # fmt: skip
    assert parse(read) == {"index-url": url, "cert": "/run/secrets/pip-ca", "config-file": str(written)}
