"""Every metric, defined once: name, type, help, labels. No torch; anyone may import this.

Prefix `loupe_`, base units, `_total` for counters, timestamps rather than ages.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    name: str
    kind: Literal["counter", "gauge", "histogram", "info"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds, for histograms."""


STEP = Metric("loupe_step", "gauge", "Optimizer steps done in this run, restarts included.")
IMAGES = Metric("loupe_images_total", "counter", "Images trained on by all ranks since this process started.")
STEPS_SKIPPED = Metric("loupe_steps_skipped_total", "counter", "Steps skipped, by reason.", ("reason",))
STEP_SECONDS = Metric(
    "loupe_step_seconds", "histogram", "Wall time of a step, by stage; stage `total` is the whole step.", ("stage",),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)  # fmt: skip
LOSS = Metric(
    "loupe_loss",
    "gauge",
    "Mean loss of the last interval, by term; before weighting, unless it says weighted.",
    ("term",),
)
DETAILS = frozenset({
    "reconstruction", "log_variance", "adaptive_weight", "logits_real", "logits_fake", "commitment", "perplexity",
    "codebook_usage", "codes_restarted", "consistency_lpips",
})  # fmt: skip
"""Loss terms that only the metrics tell, and no line about a step."""


def shown_in_lines(term: str) -> bool:
    """Whether a line about a step tells this loss term: not the parts of one that it tells."""
    return term not in DETAILS and not term.startswith("lpl_")


EVALUATION = Metric(
    "loupe_evaluation", "gauge", "Last evaluation of the averaged weights, by metric: psnr_db, ssim, ...", ("metric",)
)
GRADIENT_NORM = Metric("loupe_gradient_norm", "gauge", "Global gradient norm before clipping, last step read.")
UPDATE_RATIO = Metric(
    "loupe_update_ratio", "gauge", "Norm of one step's update over the norm of the weights, last step read."
)
ROLL_BACKS = Metric("loupe_roll_backs_total", "counter", "Returns to the last checkpoint because of loss spikes.")
LEARNING_RATE = Metric("loupe_learning_rate", "gauge", "Learning rate of the last step.")
IMAGES_PER_SECOND = Metric("loupe_images_per_second", "gauge", "Images per second of all ranks, last interval.")
PHASE = Metric("loupe_phase", "gauge", "Index of the phase that is being trained, by its name.", ("phase",))
LAST_STEP = Metric("loupe_last_step_timestamp_seconds", "gauge", "When the last step ended, Unix time.")
CHECKPOINT_LAST = Metric(
    "loupe_checkpoint_last_success_timestamp_seconds", "gauge", "When the newest checkpoint was committed, Unix time."
)
CHECKPOINT_SECONDS = Metric(
    "loupe_checkpoint_seconds", "histogram", "Time training stood still for a save.", (),
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)  # fmt: skip
CHECKPOINT_FAILURES = Metric(
    "loupe_checkpoint_failures_total", "counter", "Failed checkpoint saves or restores.", ("operation",)
)
RESTARTS = Metric("loupe_restarts", "gauge", "Times this run has been started again.")
WORLD_SIZE = Metric("loupe_world_size", "gauge", "Ranks of this job.")
PEAK_MEMORY = Metric(
    "loupe_peak_memory_bytes", "gauge", "Peak memory of this rank: the device's, or on CPU the process's."
)
BAD_SAMPLES = Metric(
    "loupe_data_bad_samples_total", "counter", "Samples replaced because unreadable, by reason.", ("reason",)
)
BAD_SHARDS = Metric("loupe_data_bad_shards", "gauge", "Shards that this run leaves out, as they cannot be read.")
DATA_WAIT = Metric("loupe_data_wait_seconds_total", "counter", "Time that training waited for a batch.")
SHARD_WAIT = Metric(
    "loupe_data_shard_wait_seconds_total", "counter", "Time that data workers waited for a shard that they had to read."
)
FETCH_SECONDS = Metric(
    "loupe_data_fetch_seconds_total", "counter", "Time that data workers spent on fetching from storage."
)
FETCH_BYTES = Metric("loupe_data_fetch_bytes_total", "counter", "Bytes that data workers fetched from storage.")
FETCH_ERRORS = Metric(
    "loupe_data_fetch_errors_total",
    "counter",
    "Failed reads of storage, tried again or not: denied, missing, damaged, timeout or server.",
    ("error",),
)
CACHE_HITS = Metric("loupe_data_cache_hits_total", "counter", "Shards that were opened and lay in the node's cache.")
CACHE_MISSES = Metric(
    "loupe_data_cache_misses_total", "counter", "Shards that had to be fetched into the node's cache."
)
CACHE_EVICTIONS = Metric(
    "loupe_data_cache_evictions_total", "counter", "Shards removed from the node's cache for others."
)
CACHE_BYTES = Metric(
    "loupe_data_cache_bytes", "gauge", "Bytes of shards in the node's cache, when one was last fetched."
)
WORKER_DEATHS = Metric(
    "loupe_data_worker_deaths_total", "counter", "Data workers that died, in all starts of this run."
)
HANGS = Metric(
    "loupe_hangs_total", "counter", "Times a watchdog has ended this run because no step came, in all starts."
)
OWN_SECONDS = Metric(
    "loupe_rank_own_seconds",
    "gauge",
    "Time a step that this rank takes for itself, before the others and it can go on together: mean of the last window.",
)
OWN_RATIO = Metric(
    "loupe_rank_own_ratio", "gauge", "That time over the median of all ranks; above 1 the others wait for this one."
)
CAPTIONS_CUT = Metric("loupe_data_captions_cut_total", "counter", "Captions longer than the text encoder takes.")
BUILD = Metric("loupe_build", "info", "Version of the code and of torch.")

ALL = tuple(value for value in globals().values() if isinstance(value, Metric))
