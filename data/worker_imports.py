"""All that data workers import: what the process that they are forked from does first."""

from trainer.garbage import without_collection

with without_collection():
    import data.loader  # noqa: F401
