"""This machine's pip settings as files for a build: `python ops/image/pip_settings.py FOLDER`. Standard library alone.

Writes FOLDER/pip.conf and FOLDER/ca.pem, readable by their owner, and an empty FOLDER/wheels. They may hold credentials:
a build gets them as secrets, which are in no layer.
"""

import ast
import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

KEPT = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
CA_IN_BUILD = "/run/secrets/pip-ca"


def parse(listing: str) -> dict[str, str]:
    """`pip config list`'s lines as {option: value}; of several that name one option the nearest stands, the environment first.

    Its lines are SECTION.OPTION='VALUE', :env: being a section.
    """
    found: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        name, equals, value = line.partition("=")
        section, dot, option = name.partition(".")
        if not (equals and dot):
            continue
        rank = {"global": 0, "install": 1, ":env:": 2}.get(section, -1)
        if rank >= 0 and rank >= found.get(option, (-1, ""))[0]:
            found[option] = rank, str(ast.literal_eval(value))
    return {option: value for option, (_, value) in found.items()}


def for_build(settings: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """(what a build can use of the settings, what was left out because it lies on this machine's disk)."""
    kept: dict[str, str] = {}
    left_out: list[str] = []
    for option, value in settings.items():
        if option not in KEPT:
            continue
        words = value.split()
        local = [w for w in words if w.startswith(("/", "file:", "~", "."))]
        left_out += local
        if rest := [w for w in words if w not in local]:
            kept[option.removeprefix("default-")] = " ".join(rest)
    return kept, left_out


def main(folder: Path) -> None:
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    settings = parse(listing)
    kept, left_out = for_build(settings)
    ca = settings.get("cert") or os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    os.umask(0o077)
    (folder / "wheels").mkdir(parents=True)
    if ca:
        shutil.copyfile(ca, folder / "ca.pem")
        kept["cert"] = CA_IN_BUILD
    else:
        (folder / "ca.pem").touch()
    config = configparser.RawConfigParser()
    config["global"] = kept
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
    for path in left_out:
        print(f"pip's {path} is on this machine's disk, the build does not see it; WHEELS=FOLDER gives it a folder")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
