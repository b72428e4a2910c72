"""Where an export is put: what others have there stays, and what broke off is made good."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from trainer.errors import UserError
from trainer.export.target import MODEL_INDEX, RECORD, files_of, free_target, put_in_place


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def export_of(*names: str) -> Callable[[Path], None]:
    """Writes an export with these files."""

    def write(folder: Path) -> None:
        for name in (*names, MODEL_INDEX):
            (folder / name).write_text(name)
        record = {"format": "loupe-export", "files": files_of(folder)}
        (folder / RECORD).write_text(json.dumps(record))

    return write


def names_at(fs: fsspec.AbstractFileSystem, root: str) -> set[str]:
    return {path.rpartition("/")[2] for path in fs.find(root)}


@pytest.mark.parametrize("url", ["memory://bucket/model", "{tmp}/model"])
def test_an_export_replaces_the_one_before(url: str, tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    url = url.format(tmp=tmp_path)
    for names in (("a", "b", "c"), ("a", "d"), ("d",)):
        put_in_place(free_target(url), export_of(*names))
        fs, root = fsspec.core.url_to_fs(url)
        assert names_at(fs, root) == {*names, MODEL_INDEX, RECORD}


@pytest.mark.parametrize("url", ["memory://bucket/model", "{tmp}/model"])
def test_what_others_have_there_stays(url: str, tmp_path: Path, memory: fsspec.AbstractFileSystem) -> None:
    url = url.format(tmp=tmp_path)
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/config.json", b'{"model_type": "clip"}')
    fs.pipe_file(f"{root}/model.safetensors", b"theirs")
    with pytest.raises(UserError, match="which no export writes and replacing it would lose"):
        free_target(url)
    fs.rm(root, recursive=True)

    target = free_target(url)

    def write(folder: Path) -> None:
        export_of("a")(folder)
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/notes.txt", b"it came while this was written")

    with pytest.raises(UserError, match=r"holds notes\.txt"):
        put_in_place(target, write)
    assert names_at(fs, root) == {"notes.txt"}
    assert not list(tmp_path.glob(".model-*")), "nothing is left behind"


def test_a_link_stays_and_the_export_goes_to_where_it_leads(tmp_path: Path) -> None:
    place, link = tmp_path / "disk" / "model", tmp_path / "current"
    place.parent.mkdir()
    link.symlink_to(place)
    for names in (("a", "b"), ("c",)):  # into nothing, then in place of the one before
        put_in_place(free_target(str(link)), export_of(*names))
        assert link.is_symlink()
        assert {path.name for path in place.iterdir()} == {*names, MODEL_INDEX, RECORD}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "disk"]
        assert list(place.parent.iterdir()) == [place], "nothing is left behind"
    (place / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"current: holds notes\.txt, which no export writes"):
        free_target(str(link))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop: a link that leads to itself"):
        free_target(str(tmp_path / "loop"))


def test_an_upload_that_breaks_off_anywhere_is_made_good(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "memory://bucket/model"
    for breaks_at in range(12):
        memory.store.clear()
        put_in_place(free_target(url), export_of("a", "b", "c"))
        calls = [0]

        def struck(original: object, at: int = breaks_at, calls: list[int] = calls) -> object:
            def call(*arguments: object, **options: object) -> object:
                calls[0] += 1
                if calls[0] - 1 == at:
                    raise OSError("storage is away")
                return original(*arguments, **options)  # type: ignore[operator]

            return call

        with monkeypatch.context() as patch:
            for name in ("rm_file", "put_file"):
                patch.setattr(memory, name, struck(getattr(memory, name)))
            try:
                put_in_place(free_target(url), export_of("d"))
                whole = True
            except UserError:
                whole = False
        assert whole == (calls[0] <= breaks_at)
        if not whole:
            assert not (memory.exists(f"/bucket/model/{MODEL_INDEX}") and memory.exists("/bucket/model/d"))
        put_in_place(free_target(url), export_of("d"))
        assert names_at(memory, "/bucket/model") == {"d", MODEL_INDEX, RECORD}
    assert whole
