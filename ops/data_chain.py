"""The data platform from end to end on a folder of photos: raw tars, faces, captions, dataset, verification, training from S3.

    python -m ops.data_chain PHOTOS --faces yunet.onnx --captioner FLORENCE_FOLDER [--out runs/data-chain]

Each step is a command that is printed before it runs, so what is printed is the way to do it on data of one's own. Without
--url an S3 server of its own is started for as long as it takes (moto's, in memory): it is spoken to as AWS or MinIO are.
"""

import argparse
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from trainer.errors import ExitCode, UserError

SAMPLES_A_TAR = 64
LOUPE = [sys.executable, "-m", "launch.cli"]
START_S = 60
CAPTION_TOKENS = 100


def commands(
    root: str, faces: str, captioner: str, run_dir: str, *, side: int, batch: int, steps: int
) -> list[list[str]]:
    """The chain, from `root`/raw to a trained run."""
    train = [
        sys.executable, "launch/slurm.py", "photos", "--cluster", "local", "--gpus-per-node", "2", "--cpu", "--fresh",
        "--run-dir", run_dir, "--set", f"data.datasets.photos.url={root}/dataset", "--set", f"data.cache_dir={run_dir}-cache",
        "--set", f"phases.low_resolution.steps={steps * 2 // 5}", "--set", f"phases.full_resolution.steps={steps * 2 // 5}",
        "--set", f"phases.perceptual.steps={steps - 2 * (steps * 2 // 5)}", "--set", f"samples.every_steps={steps}",
        "--set", f"phases.low_resolution.batch_size={batch}", "--set", f"phases.full_resolution.batch_size={batch}",
        "--set", f"phases.perceptual.batch_size={batch}",
    ]  # fmt: skip
    return [
        [*LOUPE, "data", "ingest", f"{root}/raw", f"{root}/images", "--min-side", str(side)],
        [*LOUPE, "data", "faces", f"{root}/images", f"{root}/blurred", "--weights", faces],
        [
            *LOUPE, "data", "recaption", f"{root}/blurred", f"{root}/captions", "--model", captioner,
            "--prompt", "<MORE_DETAILED_CAPTION>", "--max-new-tokens", str(CAPTION_TOKENS),
        ],
        [*LOUPE, "data", "build", f"{root}/blurred", f"{root}/dataset", "--captions", f"{root}/captions"],
        [*LOUPE, "data", "verify", f"{root}/dataset"],
        train,
    ]  # fmt: skip


def pack(photos: Path, target: str) -> int:
    """Tars as img2dataset writes them, of a folder with a metadata.jsonl: KEY.jpg, KEY.txt, KEY.json. Returns their number.

    Raises:
        UserError: no metadata.jsonl there, or none of its images.
    """
    try:
        rows = [
            json.loads(line)
            for line in (photos / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    except OSError as e:
        raise UserError(f"{photos}/metadata.jsonl: {e.strerror}; give a folder of photos with captions") from None
    fs, root = fsspec.url_to_fs(target)
    fs.makedirs(root, exist_ok=True)
    number = 0
    for first in range(0, len(rows), SAMPLES_A_TAR):
        whole = io.BytesIO()
        with tarfile.open(fileobj=whole, mode="w") as tar:
            for row in rows[first : first + SAMPLES_A_TAR]:
                image = next(
                    (p for p in (photos / row["file_name"], photos / "images" / row["file_name"]) if p.is_file()), None
                )
                if image is None:
                    raise UserError(f"{photos}: no {row['file_name']}, which metadata.jsonl names")
                captions = row.get("captions") or [row.get("text", "")]
                about = {
                    "key": image.stem,
                    "caption": captions[0],
                    "license": row.get("license"),
                    "url": row.get("coco_url"),
                }
                for suffix, data in (
                    (image.suffix, image.read_bytes()),
                    (".txt", "\n".join(captions).encode()),
                    (".json", json.dumps(about).encode()),
                ):
                    member = tarfile.TarInfo(image.stem + suffix)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        fs.pipe_file(f"{root}/{number:05d}.tar", whole.getvalue())
        number += 1
    return number


@contextmanager
def own_server() -> Iterator[str]:
    """The URL of a bucket on an S3 server that ends with the block, which this process and its children then speak to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    try:
        _wait_for(endpoint, server)
        fsspec.filesystem("s3").mkdir("loupe-data")
        yield "s3://loupe-data"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(endpoint: str, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        if server.poll() is not None or time.monotonic() > deadline:
            raise UserError("moto's S3 server does not start; install the `dev` extra, or give --url")
        try:
            with urllib.request.urlopen(endpoint, timeout=1):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)


def run(arguments: argparse.Namespace) -> int:
    """The first command that fails ends it, with its exit code."""
    with own_server() if arguments.url is None else _given(arguments.url) as root:
        print(f"packing {arguments.photos} into {root}/raw: {pack(arguments.photos, f'{root}/raw')} tars", flush=True)
        chain = commands(
            root, arguments.faces, arguments.captioner, arguments.out, side=arguments.min_side, batch=arguments.batch_size,
            steps=arguments.steps,
        )  # fmt: skip
        for command in chain:
            words = ["loupe", *command[3:]] if command[:3] == LOUPE else ["python", *command[1:]]
            print(f"\n$ {shlex.join(words)}", flush=True)
            began = time.monotonic()
            if code := subprocess.run(command, check=False).returncode:
                return code
            print(f"({time.monotonic() - began:.1f} s)", flush=True)
    return 0


@contextmanager
def _given(url: str) -> Iterator[str]:
    yield url.rstrip("/")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder with metadata.jsonl and images")
    parser.add_argument("--faces", required=True, help="YuNet's ONNX file")
    parser.add_argument("--captioner", required=True, help="folder of a Florence-2")
    parser.add_argument(
        "--url", help="where to put it all, such as s3://bucket/folder; a server of its own when absent"
    )
    parser.add_argument("--out", default="runs/data-chain", help="run folder of the training (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of the training (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--min-side", type=int, default=64, help="smaller photos are left out (%(default)s px)")
    try:
        return run(parser.parse_args())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return int(ExitCode.USAGE)


if __name__ == "__main__":
    sys.exit(main())
