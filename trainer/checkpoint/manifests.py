"""What a checkpoint says it is, verified without reading its tensors. No torch."""

from trainer.checkpoint import folder as names
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder, Entry
from trainer.checkpoint.records import COMMIT_LIMIT, MANIFEST_LIMIT, Manifest, check_sizes, parse_commit, parse_manifest


def read_manifest(folder: CheckpointFolder, entry: Entry) -> Manifest:
    """
    Raises:
        UserError: another version of the format.
        CorruptCheckpoint: COMMIT or the manifest is damaged, or an object is missing or of another size.
    """
    where = folder.url_of(entry.name)
    commit_data = folder.read_small(f"{entry.name}/{names.COMMIT}", size=entry.sizes[names.COMMIT], limit=COMMIT_LIMIT)
    commit = parse_commit(commit_data, f"{where}/{names.COMMIT}")
    if entry.sizes.get(names.MANIFEST) != commit.manifest_bytes:
        raise CorruptCheckpoint(
            f"{where}/{names.MANIFEST}: {entry.sizes.get(names.MANIFEST, 'no')} bytes, {commit.manifest_bytes} were written"
        )
    data = folder.read_small(f"{entry.name}/{names.MANIFEST}", size=commit.manifest_bytes, limit=MANIFEST_LIMIT)
    manifest = parse_manifest(data, commit, f"{where}/{names.MANIFEST}")
    check_sizes(manifest.objects, entry.sizes, where)
    return manifest
