"""A rank's batch in the parts that pass through the model one by one."""

from dataclasses import replace

from data.batches import Batch


def split(batch: Batch, micro_batch_size: int | None) -> list[Batch]:
    """The rank's batch in micro-batches that share its memory."""
    size = len(batch.captions)
    step = min(micro_batch_size or size, size)
    if step == size:
        return [batch]
    return [
        replace(
            batch,
            positions_B=batch.positions_B[i : i + step],
            images_BCHW=batch.images_BCHW[i : i + step],
            latents_BCHW=None if batch.latents_BCHW is None else batch.latents_BCHW[i : i + step],
            captions=batch.captions[i : i + step],
            labels_B=batch.labels_B[i : i + step],
            keys=batch.keys[i : i + step],
            substitutions=batch.substitutions if i == 0 else (),
        )
        for i in range(0, size, step)
    ]
