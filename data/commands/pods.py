"""Whether a stage's folders can be seen from a cluster's pods."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from data.storage import Storage
from trainer.errors import UserError

if TYPE_CHECKING:
    from launch.pods.volumes import Volume

_FOLDERS = {"captions": "--captions", "columns": "--columns", "work": "--work"}
_FILES = {"weights": "--weights", "model": "--model", "codec": "--codec", "class_names": "--class-names"}
"""These may lie in the container, too."""


def check_places(context: click.Context, volumes: Sequence["Volume"]) -> None:
    """Refuse folders that pods would not see, and tell which files their container must have.

    Raises:
        UserError: a folder of this machine's disks that no volume holds.
    """
    for name, url in _given(context, _FOLDERS):
        path = _local(url)
        if path is not None and not any(volume.holds(path) for volume in volumes):
            raise UserError(
                f"{name}: {url} is a folder of this machine, which pods do not see; give a URL such as s3://bucket/folder, or "
                "a PersistentVolumeClaim that holds it by --volume-claim CLAIM:/path, and its whole path"
            )
        if path is not None and path != url.rstrip("/"):
            raise UserError(f"{name}: {url} is found from this folder only; write {path}")
    for name, url in _given(context, _FILES, arguments=False):
        path = _local(url)
        if path is not None and os.path.exists(path) and not any(volume.holds(path) for volume in volumes):
            click.echo(f"note: the container must have {name} at {url}", err=True)


def _given(context: click.Context, options: dict[str, str], *, arguments: bool = True) -> Iterator[tuple[str, str]]:
    """(name, value) of the arguments, if wanted, and of these options."""
    for param in context.command.params:
        value = context.params.get(param.name or "")
        of_argument = arguments and isinstance(param, click.Argument)
        if value is None or not (of_argument or param.name in options):
            continue
        for one in value if isinstance(value, tuple | list) else (value,):
            text = str(one)
            if param.name == "captions" and "=" in text.partition("/")[0]:  # KIND=URL
                text = text.partition("=")[2]
            yield (param.human_readable_name if of_argument else options[param.name or ""]).rstrip("."), text


def _local(url: str) -> str | None:
    """The whole path of what lies on this machine's disks."""
    storage = Storage(url)
    return storage.root or "/" if storage.is_local else None
