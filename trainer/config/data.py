"""Which data a run streams, and how."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from trainer.config.section import NonNegativeInt, Probability, Section


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_more)]
"""One name may stand without its list."""


class DatasetConfig(Section):
    url: str
    """Folder of an MDS dataset in the training schema; `repo://PATH` lies within the code itself."""
    max_samples: PositiveInt | None = None
    """Use the first so many samples only."""
    fetch: Literal["shards", "ranges"] = "shards"
    """Of a remote dataset: whole shards, verified and cached; or each sample for itself, which begins at once and suits small
    max_samples, but no hash can be checked then, and storage is asked for each sample in each epoch."""
    class_balanced: bool = False
    """Draw each class equally often, whatever its size; needs the dataset's file of labels. Samples without a label are not
    drawn. Costs 4 bytes of memory a sample in each process."""


class DataConfig(Section):
    datasets: dict[str, DatasetConfig]
    """Named sources; a phase mixes them by weight."""
    buckets: bool = False
    """Keep the images' proportions: every global batch is of one aspect bucket, at an area of about resolution^2. The
    datasets must be built with buckets. Otherwise all images are cropped to squares."""
    caption_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """How often each kind of caption is taken, such as {original: 1, detailed: 3}. Kinds that a sample lacks are left out of
    its choice; empty: all of a sample's captions are alike."""
    latents: Names = ()
    """Columns of latents that `loupe data encode` has stored, one of each resolution that phases have; empty: the run encodes
    images. Latents are of centre crops as they are: random_crop and flip_probability do not go with them."""
    text_states: Names = ()
    """Columns of states that `loupe data encode` has stored of the run's frozen text encoders; captions that are not among
    them are encoded by the run."""
    random_crop: bool = False
    """Crop at a place drawn from the stream position; otherwise at the centre."""
    flip_probability: Probability = 0.0
    """Chance of a horizontal flip, drawn from the stream position."""
    shuffle_window_shards: PositiveInt = 64
    """Samples are shuffled within windows of so many (shuffled) shards; with buckets, of about so many of all of them."""
    num_workers: NonNegativeInt = 1
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch_steps: PositiveInt = 4
    """Steps' batches that each worker prepares ahead."""
    timeout_s: PositiveFloat = 120.0
    """Longest wait for a batch before the job gives up."""
    max_bad_samples: NonNegativeInt = 100
    """Undecodable samples that are replaced and counted before the run stops."""
    max_bad_shards: NonNegativeInt = 4
    """Missing or damaged shards whose samples are replaced and counted before the run stops."""
    cache_dir: str | None = None
    """Local folder for shards of remote datasets; the system's cache folder when absent."""
    cache_gib: PositiveFloat | None = None
    """What the shards there may take; absent: 80 % of the disk's free space. Those used longest ago make room."""
    prefetch_shards: NonNegativeInt | None = None
    """Shards that are fetched before the plan needs them; absent: as many as shuffle_window_shards, so that the next window is
    there when it begins."""
    decode: Literal["fast", "balanced", "exact"] = "balanced"
    """How JPEGs that are larger than the resolution are shrunk: `exact` decodes them in full and averages areas; `balanced`
    decodes at twice the resolution or more; `fast` lets the JPEG decoder do as much of it as it can."""

    @model_validator(mode="after")
    def _crops_are_stored(self) -> "DataConfig":
        for field in ("random_crop", "flip_probability") if self.latents else ():
            if value := getattr(self, field):
                raise ValueError(f"{field}: {value}, but data.latents are of centre crops as they are; set it to "
                                 f"{type(value)()}, or train on images with data.latents=[]")  # fmt: skip
        return self
