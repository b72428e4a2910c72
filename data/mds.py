"""mosaicml-streaming's MDS format without the rest of mosaicml-streaming."""

import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

from trainer.errors import UserError


class MDS(NamedTuple):
    Reader: Any
    """`MDSReader`"""
    Writer: Any
    """`MDSWriter`, that ends without a pause"""
    is_encoding: Any
    """`is_mds_encoding`"""


@cache
def mds() -> MDS:
    """The format's reader and writer.

    `streaming` itself imports torchvision, and `streaming.base` transformers, which are not installed here. Their
    format modules need neither, so the two packages enter `sys.modules` bare: with their path, without their code. Nor do
    they need torch, which `streaming.base.util` imports for other things: of it there is what they use.
    """
    for name in ("streaming", "streaming.base"):
        if name not in sys.modules:
            parent = name.rpartition(".")[0]
            spec = PathFinder.find_spec(name, sys.modules[parent].__path__ if parent else None)
            if spec is None or spec.submodule_search_locations is None:
                raise UserError("mosaicml-streaming is not installed; run `make setup`")
            module = types.ModuleType(name)
            module.__path__ = list(spec.submodule_search_locations)
            sys.modules[name] = module
    with _without_torch():
        from streaming.base.format.mds.encodings import is_mds_encoding
        from streaming.base.format.mds.reader import MDSReader
        from streaming.base.format.mds.writer import MDSWriter

    class Writer(MDSWriter):  # type: ignore[misc, valid-type]
        def _write_index(self) -> None:
            # It looks once a second whether threads have "uploaded" the shards, of which no local folder needs anything.
            self.executor.shutdown(wait=True)
            self.executor = ThreadPoolExecutor(max_workers=1)
            super()._write_index()

    return MDS(MDSReader, Writer, is_mds_encoding)


@contextmanager
def _without_torch() -> Iterator[None]:
    """Within, `streaming.base.util` is what the format's modules use of it. Whoever imports it later gets their own."""
    name = "streaming.base.util"
    if name in sys.modules:
        yield
        return
    util: Any = types.ModuleType(name)
    util.bytes_to_int = int  # sizes are numbers here
    util.get_import_exception_message = "{} is not installed ({})".format
    util.retry = lambda *_, **__: lambda function: function  # of an upload, and nothing is uploaded
    sys.modules[name] = util
    try:
        yield
    finally:
        del sys.modules[name]
