"""Which data a run streams, and how."""

from pydantic import PositiveFloat, PositiveInt

from trainer.config.section import NonNegativeInt, Probability, Section


class DatasetConfig(Section):
    url: str
    """Folder of an MDS dataset in the training schema; `repo://PATH` lies within the code itself."""
    max_samples: PositiveInt | None = None
    """Use the first so many samples only."""


class DataConfig(Section):
    datasets: dict[str, DatasetConfig]
    """Named sources; a phase mixes them by weight."""
    random_crop: bool = False
    """Crop at a place drawn from the stream position; otherwise at the centre."""
    flip_probability: Probability = 0.0
    """Chance of a horizontal flip, drawn from the stream position."""
    shuffle_window_shards: PositiveInt = 64
    """Samples are shuffled within windows of so many (shuffled) shards."""
    num_workers: NonNegativeInt = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch_steps: PositiveInt = 4
    """Steps' batches that each worker prepares ahead."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for a batch before the job gives up."""
    max_bad_samples: NonNegativeInt = 100
    """Undecodable samples that are replaced and counted before the run stops."""
    cache_dir: str | None = None
    """Local folder for shards of remote datasets; the system's cache folder when absent."""
