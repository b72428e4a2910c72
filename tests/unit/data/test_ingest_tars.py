"""Tars as they come, whole and damaged. What must come out is told by tarfile, or by how the damage was made."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.ingest.ranges import RangeReader
from data.ingest.tars import TarSample, read_samples
from tests.unit.data.conftest import encoded, picture
from trainer.errors import UserError

MAX = 1 << 20
BLOCK = 512


def jpeg(number: int) -> bytes:
    return encoded(picture(number))


def member(
    name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def whole(count: int, name: str = "{:05d}") -> list[tuple[tarfile.TarInfo, bytes]]:
    members = []
    for i in range(count):
        members += [member(f"{name.format(i)}.jpg", jpeg(i)), member(f"{name.format(i)}.txt", f"picture {i}".encode())]
    return members


def read(folder: Path, data: bytes, offset: int = 0, range_bytes: int = 3000) -> list[TarSample]:
    path = folder / "x.tar"
    path.write_bytes(data)
    return list(read_samples(RangeReader(str(path), range_bytes=range_bytes), offset, max_image_bytes=MAX))


def good(samples: list[TarSample]) -> dict[str, dict[str, bytes]]:
    return {s.key: s.fields for s in samples if s.problem is None}


def problems(samples: list[TarSample]) -> list[str]:
    return [s.problem.reason for s in samples if s.problem is not None]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_tarfile_reads_is_read(tmp_path: Path, format: int) -> None:
    names = ["a", "./b", "deep/er/c", "x" * 90]
    if format != tarfile.USTAR_FORMAT:
        names += ["y" * 180, "f" * 150 + "/" + "z" * 150, "Straße\u200d/猫"]
    members = []
    for i, name in enumerate(names):
        members += [
            member(f"{name}.JPG", jpeg(i)), member(f"{name}.json", b'{"caption": "c"}'), member(f"{name}.npy", b"1234")
        ]  # fmt: skip
    data = tar_of(member("deep", kind=tarfile.DIRTYPE), *members, format=format)
    samples = read(tmp_path, data)
    assert not problems(samples)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected: dict[str, dict[str, bytes]] = {}
        for info in tar:
            stem, _, extension = info.name.removeprefix("./").rpartition(".")
            if extension in ("JPG", "json"):
                file = tar.extractfile(info)
                assert file
                expected.setdefault(stem, {})[extension.lower()] = file.read()
    assert good(samples) == expected
    assert len(samples) == len(names)


def test_going_on_at_any_sample_reads_the_rest(tmp_path: Path) -> None:
    data = bytearray(tar_of(member("gone.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"), *whole(6)))
    at = data.index(b"00003.jpg")
    data[at + 20] ^= 1
    cut = data.index(b"00005.txt")
    for some, count in ((data, 8), (data[:cut], 9), (data[: cut + BLOCK], 8), (data[: cut + 40], 9)):
        samples = read(tmp_path, bytes(some), range_bytes=1 << 20)
        assert len(samples) == count
        for i, sample in enumerate(samples):
            rest = read(tmp_path, bytes(some), sample.next, range_bytes=1 << 20)
            assert [(s.key, s.next, s.fields) for s in rest] == [(s.key, s.next, s.fields) for s in samples[i + 1 :]]


def test_a_broken_header_costs_its_own_sample_only(tmp_path: Path) -> None:
    data = bytearray(tar_of(*whole(8)))
    at = data.index(b"00004.jpg")
    data[at : at + BLOCK] = bytes(range(256)) * 2
    samples = read(tmp_path, bytes(data))
    assert {s.key for s in samples if s.image() and not s.problem} == {f"{i:05d}" for i in range(8) if i != 4}
    assert problems(samples) == ["broken_header"]
    assert f"byte {at}" in samples[4].problem.detail  # type: ignore[union-attr]
    assert samples[5].fields.keys() == {"txt"}  # its text is still there, and is found to lack the image


def test_bytes_that_were_lost_or_added_do_not_hide_the_rest(tmp_path: Path) -> None:
    data = tar_of(*whole(8))
    cut = data.index(b"00003.jpg") + BLOCK + 100
    for damaged in (data[:cut] + data[cut + 77 :], data[:cut] + b"?" * 77 + data[cut:]):
        samples = read(tmp_path, damaged)
        kept = good(samples)
        assert {f"{i:05d}" for i in range(8) if i != 3} <= kept.keys()
        assert all(kept[f"{i:05d}"] == {"jpg": jpeg(i), "txt": f"picture {i}".encode()} for i in (0, 1, 2, 4, 5, 6, 7))
        assert "broken_header" in problems(samples)


def test_a_tar_that_ends_early(tmp_path: Path) -> None:
    data = tar_of(*whole(5))
    at = data.index(b"00003.jpg")
    for cut in (at + 100, at + BLOCK, at + BLOCK + 50):
        samples = read(tmp_path, data[:cut])
        assert list(good(samples)) == ["00000", "00001", "00002"]
        assert problems(samples) == ["truncated"]
    samples = read(tmp_path, data[:at])  # between two files: only the end mark is missing
    assert list(good(samples)) == ["00000", "00001", "00002"]
    assert problems(samples) == ["no_end_mark"]


@pytest.mark.parametrize(
    "refused",
    [
        member("../../evil.jpg", b"x"),
        member("/etc/evil.jpg", b"x"),
        member("a/../../evil.jpg", b"x"),
        member("a\\evil.jpg", b"x"),
        member("bad\x01.jpg", b"x"),
        member("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("link.jpg", kind=tarfile.LNKTYPE, link="00000.jpg"),
        member("null.jpg", kind=tarfile.CHRTYPE),
        member("disk.jpg", kind=tarfile.BLKTYPE),
        member("pipe.jpg", kind=tarfile.FIFOTYPE),
        member("sparse.jpg", b"x", kind=tarfile.GNUTYPE_SPARSE),
        member("n" * 600 + ".jpg", b"x"),
    ],
    ids=lambda m: m[0].name[:20] + m[0].type.decode(),
)
def test_members_that_no_dataset_has_are_refused_and_counted(
    tmp_path: Path, refused: tuple[tarfile.TarInfo, bytes]
) -> None:
    first, second = whole(2)[:2], whole(2)[2:]
    samples = read(tmp_path, tar_of(*first, refused, *second))
    assert list(good(samples)) == ["00000", "00001"]
    assert problems(samples) == ["unsafe_member"]


def test_hidden_files_are_none_of_ours(tmp_path: Path) -> None:
    hidden = [member("._00000.jpg", b"finder"), member(".DS_Store", b"x"), member("README", b"x")]
    assert list(good(read(tmp_path, tar_of(*hidden, *whole(1), *hidden)))) == ["00000"]


def test_joined_tars_are_read_to_the_end(tmp_path: Path) -> None:
    samples = read(tmp_path, tar_of(*whole(2, "a{}")) + tar_of(*whole(2, "b{}")))
    assert list(good(samples)) == ["a0", "a1", "b0", "b1"]
    assert not problems(samples)


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    large = member("large.jpg", bytes(MAX + 1))
    text = member("text.txt", b"x" * (MAX + 1))
    samples = read(tmp_path, tar_of(large, member("large.txt", b"x"), text, *whole(1)))
    assert problems(samples) == ["too_large", "too_large"]
    assert samples[0].fields == {"jpg": b"", "txt": b"x"}
    assert list(good(samples)) == ["00000"]


def test_a_key_that_comes_again_is_a_sample_of_its_own(tmp_path: Path) -> None:
    samples = read(tmp_path, tar_of(*whole(1), *whole(1)))
    assert [s.key for s in samples] == ["00000", "00000"]


def test_pax_headers_that_lie(tmp_path: Path) -> None:
    def pax(record: bytes) -> tuple[tarfile.TarInfo, bytes]:
        return member("pax", record, kind=tarfile.XHDTYPE)

    for record in (b"99 path=x\n", b"0 path=x\n", b"x path=x\n", b"21 size=-5555555555\n", b"12 pathxxx\n"):
        samples = read(tmp_path, tar_of(pax(record), *whole(2)))
        assert "broken_header" in problems(samples)
        assert "00001" in good(samples)
    samples = read(tmp_path, tar_of(pax(b"21 path=../../evil.x\n"), *whole(2)))
    assert problems(samples)[0] == "unsafe_member"
    assert "00001" in good(samples)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzip.compress(tar_of(*whole(1))), "compressed with gzip"),
        (b"", "an empty file"),
        (b"no tar at all" * 100, "no tar"),
        (jpeg(0), "no tar"),
    ],
)
def test_what_is_no_tar(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path, data)
    assert "x.tar" in str(e.value)


def test_whatever_bytes_are_damaged_reading_ends_and_loses_little(tmp_path: Path) -> None:
    data = tar_of(*whole(10))
    starts = [data.index(f"{i:05d}.{kind}".encode()) for i in range(10) for kind in ("jpg", "txt")]
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        hit = int(rng.integers(20))
        damaged[starts[hit] + int(rng.integers(BLOCK))] ^= 1 << int(rng.integers(8))
        samples = read(tmp_path, bytes(damaged), range_bytes=1 << 20)
        complete = {s.key for s in samples if s.problem is None and s.fields.keys() == {"jpg", "txt"}}
        assert len(complete) >= 9
        assert [s.next for s in samples] == sorted(s.next for s in samples)
