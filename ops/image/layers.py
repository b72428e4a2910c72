"""What the layers of an image hold: their sizes, and what has no business there. Reads `docker save`'s archives.

A file that a later layer deletes is still in the earlier one, and whoever pulls the image has it: so each layer is looked
through by itself, not the file system that they make together.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT_IS_OWNER = ("bin", "boot", "etc", "lib", "lib32", "lib64", "opt", "root", "sbin", "usr")
"""Where a file of another owner is one that the running program could change."""
CACHE = re.compile(r"(^|/)\.cache/|^var/cache/apt/.*\.(deb|bin)$|^var/lib/apt/lists/(?!partial$|auxfiles$|lock$)[^/]+$")
VERSION_CONTROL = re.compile(r"(^|/)\.(git|hg|svn)(/|$)")
SECRET_NAME = re.compile(
    r"(^|/)(\.netrc|\.pypirc|\.env|\.env\.[^/]+|\.git-credentials|\.dockercfg|pip\.conf|kubeconfig|credentials(\.json)?|"
    r"id_(rsa|dsa|ecdsa|ed25519)|[^/]+\.(p12|pfx|jks|keytab|kdbx|ppk))$"
    r"|(^|/)\.(aws|ssh|kube|docker|gnupg)/."
    r"|^run/secrets/."
)
TEXT_NAME = re.compile(
    r"\.(pem|key|crt|cfg|conf|ini|json|toml|ya?ml|txt|list|sources|sh|env|npmrc|pth)$|^(.*/)?[^./]+$"
)
SECRET_TEXT = re.compile(
    rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----\s+[A-Za-z0-9+/]{32}|\bAKIA(?!\w*EXAMPLE)[0-9A-Z]{16}\b|://[^\s/:@'\"<>{}$*]+:[^\s/:@'\"<>{}$*]+@"
)
MAX_TEXT_BYTES = 1 << 18


@dataclass(frozen=True)
class Layer:
    made_by: str
    num_files: int
    num_bytes: int
    """Of the files, unpacked."""
    findings: tuple[str, ...]


@dataclass(frozen=True)
class Image:
    layers: tuple[Layer, ...]
    findings: tuple[str, ...]
    """In the image's own settings: its environment, its history, its user."""


def read_image(archive: Path, *, num_base_layers: int = 0) -> Image:
    """The image of an archive of `docker save` or `podman save --format docker-archive`.

    Args:
        num_base_layers: so many of the first layers are the base's: measured, but what they hold is their maker's business.
    """
    with tarfile.open(archive) as tar:
        (entry,) = json.loads(_bytes_of(tar, "manifest.json"))
        settings = json.loads(_bytes_of(tar, entry["Config"]))
        made_by = [step.get("created_by", "") for step in settings["history"] if not step.get("empty_layer")]
        assert len(made_by) == len(entry["Layers"])
        layers = []
        for number, (name, words) in enumerate(zip(entry["Layers"], made_by, strict=True)):
            file = tar.extractfile(name)
            assert file is not None
            layers.append(_read_layer(file, words, look=number >= num_base_layers))
    return Image(tuple(layers), tuple(_in_settings(settings)))


def _bytes_of(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


def _read_layer(file: IO[bytes], made_by: str, *, look: bool) -> Layer:
    num_files = num_bytes = 0
    findings: list[str] = []
    with tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            num_files += not member.isdir()
            num_bytes += member.size
            if look:
                findings += _in_member(tar, member)
    return Layer(_shown(made_by), num_files, num_bytes, tuple(findings))


def _in_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[str]:
    path = member.name.removeprefix("./").rstrip("/")
    if path.rpartition("/")[2].startswith(".wh."):
        return  # says that the file of an earlier layer is gone
    if member.isfile() and CACHE.search(path):
        yield f"a cache: {path}"
    if VERSION_CONTROL.search(path):
        yield f"version control: {path}"
    # a name that held a secret while the image was built stays as an empty file
    if member.isfile() and member.size and SECRET_NAME.search(path):
        yield f"looks like a secret: {path}"
    if not member.issym() and not member.islnk():
        sticky = member.isdir() and member.mode & 0o1000
        if member.mode & 0o002 and not sticky and not member.isdev():
            yield f"anyone may write to it: {path} ({member.mode:o})"
        if member.uid and path.partition("/")[0] in ROOT_IS_OWNER:
            yield f"belongs to user {member.uid}, not to root: {path}"
    if member.isfile() and 0 < member.size <= MAX_TEXT_BYTES and TEXT_NAME.search(path):
        file = tar.extractfile(member)
        assert file is not None
        if SECRET_TEXT.search(file.read()):
            yield f"holds a key or a password: {path}"


def _in_settings(settings: dict[str, object]) -> Iterator[str]:
    run = settings.get("config")
    assert isinstance(run, dict)
    if not re.fullmatch(r"[1-9]\d*(:\d+)?", str(run.get("User", ""))):
        yield f"its user is {run.get('User') or 'root'!r}: Kubernetes can check that a number is not root, a name it refuses"
    if SECRET_TEXT.search(json.dumps(settings).encode()):
        yield "a key or a password in its history or environment"
    labels = run.get("Labels") or {}
    for name in ("title", "version", "revision", "licenses", "base.name"):
        if not labels.get(f"org.opencontainers.image.{name}"):
            yield f"no label org.opencontainers.image.{name}"


def _shown(made_by: str) -> str:
    """A step of the Dockerfile without what the builders put around it."""
    words = re.sub(r"^RUN |^/bin/sh -c |#\(nop\) +|--mount=\S+ +| # buildkit$", "", made_by)
    words = re.sub(r"^/bin/sh -c |--mount=\S+ +", "", words)
    return " ".join(words.split())
