"""The stream beside others, in one run: decoding, reading without decoding, and both together from disk and from S3.

    python -m ops.bench.data --photos FOLDER                    all three, a few minutes
    python -m ops.bench.data --photos FOLDER --only decode --images 200
    python -m ops.bench.data --photos FOLDER --only read stream --samples 4000 --workers 2 --decode balanced
    python -m ops.bench.data --photos FOLDER --only stream --s3 s3://bucket/scratch

decode: images/s on one core, from JPEGs of --side pixels to --resolution, with the quality of each way against a full decode
    shrunk by area averaging (PSNR).
    By the time that the process computes, so that others on the machine do not count.
read: samples/s of one process that decodes nothing, in shuffled order: ours by the plan, StreamingDataset's iterator, and
    WebDataset.
stream: images/s of --workers processes, all three with our decoding; from local disk, and from S3 with nothing cached.

Photos are JPEGs of any size; they are cropped, resized and encoded once, and repeated up to --samples. S3 is the server that
the environment names (AWS_ENDPOINT_URL, ...) where --s3 is given; else moto's, started here, on the same cores.
Ways are measured in turns, so that noise of the machine falls on all alike; medians are printed, and ratios first.
"""

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from data.batches import DECODE_MARGIN, BatchRequest, Decode
from data.images import read_image
from data.loader import Loader
from data.mds import mds
from data.plan import MixSegment, Mixture
from data.reader import open_dataset
from data.schema import COLUMNS, HASH, DatasetInfo, index_digest
from data.transforms import training_image

PARTS = ("decode", "read", "stream")
_WINDOW_SHARDS = 4
_PREPARED = 4
"""Batches that each worker may be ahead."""

Pixels = NDArray[np.uint8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs, also in folders below it")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--side", type=int, default=512, help="of the images that are read, in pixels, square")
    parser.add_argument("--resolution", type=int, default=256, help="that they are brought to")
    parser.add_argument("--images", type=int, default=100, help="distinct ones")
    parser.add_argument("--samples", type=int, default=2000, help="of the datasets that are read")
    parser.add_argument("--shard-mib", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--decode", choices=list(DECODE_MARGIN), default="fast", help="of all three streams")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--s3", help="URL to write the datasets to; what is there is replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    files = jpegs(options)
    print(f"{len(files)} photos of {options.side} px, {statistics.mean(map(len, files)) / 1e3:.0f} KB each")
    if "decode" in options.only:
        decode(options, files)
    if set(options.only) & {"read", "stream"}:
        with tempfile.TemporaryDirectory(prefix="loupe-bench-") as folder:
            os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
            sets = write(options, files, Path(folder))
            if "read" in options.only:
                read(options, sets)
            if "stream" in options.only:
                stream(options, sets, Path(folder))


def jpegs(options: argparse.Namespace) -> list[bytes]:
    """Square photos of the side, 4:2:0 as cameras write them."""
    paths = sorted(p for p in options.photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: options.images]
    if not paths:
        raise SystemExit(f"--photos: no .jpg in {options.photos}")
    images = (training_image(read_image(path.read_bytes()), options.side) for path in paths)
    return [simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420") for image in images]


def in_turns(ways: dict[str, Callable[[], Sequence[float]]], repeats: int) -> dict[str, list[float]]:
    """Medians of what each returns; the first round, which fills caches, does not count."""
    found: dict[str, list[Sequence[float]]] = {name: [] for name in ways}
    for i in range(repeats + 1):
        for name, way in ways.items():
            figures = way()
            if i:
                found[name].append(figures)
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def told(found: dict[str, list[float]], units: Sequence[str], peer: str | None = None) -> None:
    """`peer`: ours is compared with it; with the better of the others when absent."""
    for i, unit in enumerate(units):
        others = [figures[i] for name, figures in found.items() if name != "ours"]
        against = found[peer][i] if peer else max(others)
        print(f"{found['ours'][i] / against:6.2f} x {peer or 'the better of the two'}, {unit}:  ", end="")
        print(",  ".join(f"{name} {figures[i]:.0f}" for name, figures in found.items()))


# --------------------------------------------------------------------------------------------------------------- decoding


def decode(options: argparse.Namespace, files: Sequence[bytes]) -> None:
    resolution = options.resolution

    def ours(margin: int | None) -> Callable[[bytes], Pixels]:
        min_side = margin * resolution if margin else None
        return lambda data: training_image(read_image(data, min_side=min_side), resolution)

    def pillow(draft: bool) -> Callable[[bytes], Pixels]:
        def way(data: bytes) -> Pixels:
            image: Any = Image.open(io.BytesIO(data))
            if draft:
                image.draft("RGB", (resolution, resolution))
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            return np.asarray(image.convert("RGB").resize((resolution, resolution), Image.Resampling.BICUBIC, box=box))

        return way

    ways = {f"ours, {name}": ours(margin) for name, margin in DECODE_MARGIN.items()}
    ways |= {"Pillow, bicubic": pillow(False), "Pillow, draft": pillow(True)}

    def speed(way: Callable[[bytes], Pixels]) -> list[float]:
        began = time.process_time()
        for data in files:
            way(data)
        return [len(files) / (time.process_time() - began)]

    medians = in_turns({name: partial(speed, way) for name, way in ways.items()}, options.repeats)
    speeds = {name: figures[0] for name, figures in medians.items()}
    best = max(speeds["Pillow, bicubic"], speeds["Pillow, draft"])
    print(
        f"\ndecode, resize, crop {options.side} -> {resolution}, one core (torchvision: not installable beside the rest)"
    )
    for name, images_s in speeds.items():
        quality = statistics.mean(psnr(ways[name](data), ways["ours, exact"](data)) for data in files)
        told = "" if quality == float("inf") else f"  {quality:5.1f} dB"
        print(f"{images_s / best:6.2f} x the faster Pillow  {images_s:7.0f} images/s  {name}{told}")


def psnr(a: Pixels, b: Pixels) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return float("inf") if not error else 10 * np.log10(255**2 / error)


# --------------------------------------------------------------------------------------------------------------- datasets


class Sets:
    def __init__(self, mds_url: str, tars: list[str], samples: int, folder: Path) -> None:
        self.mds_url, self.tars, self.samples, self.folder = mds_url, tars, samples, folder


def write(options: argparse.Namespace, files: Sequence[bytes], folder: Path) -> Sets:
    """The same samples as MDS and as tars."""
    out = folder / "mds"
    size = options.shard_mib << 20
    writer = mds().Writer(out=str(out), columns=COLUMNS, hashes=[HASH], size_limit=size)
    tars: list[str] = []
    tar: tarfile.TarFile | None = None
    for i in range(options.samples):
        data, caption = files[i % len(files)], f"a caption of photo {i % len(files)}, as long as people write them"
        writer.write({"key": f"{i:08d}", "image": data, "captions": [caption], "label": -1})
        if tar is None or tar.offset > size:
            if tar:
                tar.close()
            tars.append(str(folder / "tars" / f"{len(tars):05d}.tar"))
            Path(tars[-1]).parent.mkdir(exist_ok=True)
            tar = tarfile.open(tars[-1], "w")  # noqa: SIM115
        for suffix, content in (("jpg", data), ("txt", caption.encode())):
            info = tarfile.TarInfo(f"{i:08d}.{suffix}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert tar
    tar.close()
    writer.finish()
    digest = index_digest((out / "index.json").read_bytes())
    (out / "dataset.json").write_text(
        DatasetInfo(name="bench", num_samples=options.samples, index_digest=digest).model_dump_json()
    )
    return Sets(str(out), tars, options.samples, folder)


# ---------------------------------------------------------------------------------------------------------------- reading


def read(options: argparse.Namespace, sets: Sets) -> None:
    ways = {"ours": ours_read(sets), "StreamingDataset": streaming_read(sets), "WebDataset": webdataset_read(sets)}
    speeds = in_turns(ways, options.repeats)
    print("\nread without decoding, one process, shuffled, local disk")
    told(speeds, ("samples/s", "samples per core-second"), "StreamingDataset")


def ours_read(sets: Sets) -> Callable[[], Sequence[float]]:
    epochs = iter(range(1_000_000))
    dataset = open_dataset(sets.mds_url, name="x")
    mixture = Mixture(
        {"x": dataset.shard_sizes}, seed=0, window_shards=_WINDOW_SHARDS, segments=[MixSegment(0, {"x": 1})]
    )

    def epoch() -> Sequence[float]:
        first = next(epochs) * sets.samples
        clock, count = Clock(), 0
        for position in range(first, first + sets.samples, 50):
            for ref in mixture.refs(position, min(50, first + sets.samples - position)):
                count += len(dataset.read(ref.index).image) > 0
        return clock.speeds(count)

    return epoch


def streaming_dataset() -> Any:
    """StreamingDataset without its package's own imports, as data.mds does it for the format."""
    mds()
    for name in ("streaming.base.util", "streaming.base.dataset"):
        assert PathFinder.find_spec("streaming")
        __import__(name)
    module: types.ModuleType = sys.modules["streaming.base.dataset"]
    return module.StreamingDataset


def streaming_read(sets: Sets) -> Callable[[], Sequence[float]]:
    dataset = streaming_dataset()(local=sets.mds_url, shuffle=True, batch_size=1)

    def epoch() -> Sequence[float]:
        clock, count = Clock(), 0
        for sample in dataset:
            count += len(sample["image"]) > 0
        return clock.speeds(count)

    return epoch


def webdataset_read(sets: Sets) -> Callable[[], Sequence[float]]:
    def epoch() -> Sequence[float]:
        import webdataset

        dataset = webdataset.WebDataset(sets.tars, shardshuffle=len(sets.tars)).shuffle(500).to_tuple("jpg", "txt")
        clock, count = Clock(), 0
        for image, _ in dataset:
            count += len(image) > 0
        return clock.speeds(count)

    return epoch


# -------------------------------------------------------------------------------------------------------------- end to end


def stream(options: argparse.Namespace, sets: Sets, folder: Path) -> None:
    def ways(source: Sets) -> dict[str, Callable[[], Sequence[float]]]:
        caches = (str(folder / f"cache-{i}") for i in range(1_000_000))
        return {
            "ours": partial(ours_stream, options, source, caches),
            "StreamingDataset": partial(streaming_stream, options, source, caches),
            "WebDataset": partial(webdataset_stream, options, source),
        }

    units = ("images/s", "images per core-second")
    # first, because the process that data workers are forked from keeps the environment that it began with
    with on_s3(options, sets) as remote:
        print(
            f"\nend to end, {options.workers} workers, decode {options.decode}, batches of {options.batch_size}: local disk"
        )
        told(in_turns(ways(sets), options.repeats), units)
        print("\nend to end, as before: S3, nothing cached")
        told(in_turns(ways(remote), max(2, options.repeats // 2)), units)


@contextmanager
def on_s3(options: argparse.Namespace, sets: Sets) -> Iterator[Sets]:
    """The datasets on S3."""
    import s3fs

    url, server = options.s3, None
    try:
        if url is None:
            server, url = start_moto()
        s3fs.S3FileSystem.clear_instance_cache()
        fs = s3fs.S3FileSystem()
        root = url.removeprefix("s3://").rstrip("/")
        if server:
            fs.mkdir(root)
        for local, name in ((Path(sets.mds_url), "mds"), (Path(sets.tars[0]).parent, "tars")):
            for file in local.iterdir():
                fs.put_file(str(file), f"{root}/{name}/{file.name}")
        yield Sets(
            f"s3://{root}/mds", [f"s3://{root}/tars/{Path(t).name}" for t in sets.tars], sets.samples, sets.folder
        )
    finally:
        if server:
            server.terminate()
            server.wait(timeout=30)


def start_moto() -> tuple[subprocess.Popen[bytes], str]:
    import socket
    import urllib.request

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "S3_ENDPOINT_URL": endpoint,
    }  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=1):
                return server, "s3://loupe-bench"
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    "moto's server does not start: pip install 'moto[server]', or name one by --s3"
                ) from None
            time.sleep(0.05)


class Clock:
    """Wall time, and computing time of this process and of others."""

    def __init__(self, workers: Sequence[Any] = ()) -> None:
        self._workers = workers
        self._began = time.perf_counter(), self._computed()

    def speeds(self, count: int) -> tuple[float, float]:
        """Per second, and per second of a core."""
        wall, computed = time.perf_counter() - self._began[0], self._computed() - self._began[1]
        return count / wall, count / computed

    def _computed(self) -> float:
        ticks = 0
        for worker in self._workers:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime of proc(5)
        return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def rate(
    batches: Iterator[Any], size_of: Callable[[Any], int], workers: Callable[[], Sequence[Any]],
    options: argparse.Namespace,
) -> Sequence[float]:  # fmt: skip
    """Over the epoch's middle: neither the start of processes nor what they have prepared meanwhile is the stream's speed,
    and at the end they must still live."""
    total = options.samples // options.batch_size
    first, last = _PREPARED * options.workers, total - options.workers
    assert last > first, "--samples: too few"
    for _ in range(first):
        next(batches)
    clock = Clock(workers())
    count = sum(size_of(next(batches)) for _ in range(first, last))
    speeds = clock.speeds(count)
    for _ in batches:
        pass
    return speeds


def _request(step: int, mixture: Mixture, batch_size: int, resolution: int) -> BatchRequest:
    return BatchRequest(step, step * batch_size, mixture.refs(step * batch_size, batch_size), resolution)


def ours_stream(options: argparse.Namespace, sets: Sets, caches: Iterator[str]) -> Sequence[float]:
    cache = next(caches)
    dataset = open_dataset(sets.mds_url, name="x", cache_dir=None if sets.mds_url.startswith("/") else cache)
    mixture = Mixture(
        {"x": dataset.shard_sizes}, seed=0, window_shards=_WINDOW_SHARDS, segments=[MixSegment(0, {"x": 1})]
    )
    request = partial(_request, mixture=mixture, batch_size=options.batch_size, resolution=options.resolution)
    with Loader(
        {"x": dataset}, request, seed=0, random_crop=False, flip_probability=0.0, num_workers=options.workers,
        prefetch_steps=_PREPARED, timeout_s=120, decode=options.decode, prefetch_shards=_WINDOW_SHARDS,
    ) as loader:  # fmt: skip
        steps = loader.steps(0, sets.samples // options.batch_size)
        speeds = rate(steps, lambda batch: len(batch.keys), lambda: loader._workers, options)
    shutil.rmtree(cache, ignore_errors=True)
    return speeds


def _pixels(data: bytes, resolution: int, decode: Decode) -> torch.Tensor:
    margin = DECODE_MARGIN[decode]
    image = training_image(read_image(data, min_side=margin * resolution if margin else None), resolution)
    return torch.from_numpy(image).permute(2, 0, 1)


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(0)


class _Decoded(torch.utils.data.IterableDataset[torch.Tensor]):
    """What StreamingDataset gives, decoded."""

    def __init__(self, dataset: Any, resolution: int, decode: Decode) -> None:
        self.dataset, self.resolution, self.decode = dataset, resolution, decode

    def __iter__(self) -> Iterator[torch.Tensor]:
        for sample in self.dataset:
            yield _pixels(sample["image"], self.resolution, self.decode)


def streaming_stream(options: argparse.Namespace, sets: Sets, caches: Iterator[str]) -> Sequence[float]:
    cache = next(caches)
    remote = None if sets.mds_url.startswith("/") else sets.mds_url
    dataset = streaming_dataset()(
        remote=remote, local=cache if remote else sets.mds_url, shuffle=True, batch_size=options.batch_size
    )
    loader = torch.utils.data.DataLoader(
        _Decoded(dataset, options.resolution, options.decode), batch_size=options.batch_size,
        num_workers=options.workers, prefetch_factor=_PREPARED, worker_init_fn=_one_thread,
    )  # fmt: skip
    speeds = of_loader(loader, options)
    shutil.rmtree(cache, ignore_errors=True)
    return speeds


def of_loader(loader: Any, options: argparse.Namespace) -> Sequence[float]:
    batches: Any = iter(loader)
    return rate(batches, len, lambda: batches._workers, options)


def webdataset_stream(options: argparse.Namespace, sets: Sets) -> Sequence[float]:
    import fsspec
    import webdataset
    from webdataset.gopen import gopen_schemes

    def opened(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> Any:
        return fsspec.open(url, mode).open()

    gopen_schemes["s3"] = opened
    decoded = partial(_pixels_of_tuple, resolution=options.resolution, decode=options.decode)
    dataset = (
        webdataset.WebDataset(sets.tars, shardshuffle=len(sets.tars))
        .shuffle(500).to_tuple("jpg", "txt").map(decoded).batched(options.batch_size, collation_fn=torch.stack)
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=options.workers, prefetch_factor=_PREPARED, worker_init_fn=_one_thread
    )
    return of_loader(loader, options)


def _pixels_of_tuple(sample: tuple[bytes, bytes], resolution: int, decode: Decode) -> torch.Tensor:
    return _pixels(sample[0], resolution, decode)


if __name__ == "__main__":
    main()
