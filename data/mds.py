"""mosaicml-streaming's MDS format without the rest of mosaicml-streaming."""

import sys
import types
from importlib.machinery import PathFinder
from typing import Any, NamedTuple

from trainer.errors import UserError


class MDS(NamedTuple):
    Reader: Any
    """`MDSReader`"""
    Writer: Any
    """`MDSWriter`"""
    is_encoding: Any
    """`is_mds_encoding`"""


def mds() -> MDS:
    """The format's reader and writer.

    `streaming` itself imports torchvision, and `streaming.base` transformers, which are not installed here. Their
    format modules need neither, so the two packages enter `sys.modules` bare: with their path, without their code.
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
    from streaming.base.format.mds.encodings import is_mds_encoding
    from streaming.base.format.mds.reader import MDSReader
    from streaming.base.format.mds.writer import MDSWriter

    return MDS(MDSReader, MDSWriter, is_mds_encoding)
