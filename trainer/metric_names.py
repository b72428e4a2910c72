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
PLANNED_STEPS = Metric("loupe_planned_steps", "gauge", "Optimizer steps that this run is to have at its end.")
STEPS = Metric(
    "loupe_steps_total", "counter", "Optimizer steps done in this run, those that a restart made it do again included."
)
IMAGES = Metric(
    "loupe_images_total", "counter", "Images trained on by all ranks in this run, those of repeated steps included."
)
IN_RECORDS = {"steps_total": STEPS, "images_total": IMAGES}
"""Counters that each record of the metrics has too, by the field."""
STEPS_SKIPPED = Metric("loupe_steps_skipped_total", "counter", "Steps skipped, by reason.", ("reason",))
STAGES = (
    "data", "copy", "encode", "text", "forward", "perceptual_loss", "backward", "optimizer", "average", "checkpoint", "other",
)  # fmt: skip
"""Of a step; an autoencoder's discriminator is of `perceptual_loss`. They sum to `total`."""
STEP_SECONDS = Metric(
    "loupe_step_seconds", "histogram",
    "Time of a step on rank 0, from the end of the one before, by stage; stage `total` is all of it.",
    ("stage",),
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


LOSS_BY_NOISE = Metric(
    "loupe_loss_by_noise",
    "gauge",
    "Mean denoising loss of the last interval, in 8 bins of equal width in diffusion time: 0 has the least noise, 7 the most.",
    ("bin",),
)
VALIDATION_LOSS = Metric(
    "loupe_validation_loss",
    "gauge",
    "Loss of the averaged weights on fixed images with fixed noise, last validation, by term and noise level: 0 has the least.",
    ("term", "level"),
)
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
FLOPS = Metric(
    "loupe_step_flops", "gauge", "Floating point operations of one step on all ranks, counted, by part.", ("part",)
)
"""Parts: model (forward and backward), encoder, text, perceptual_loss, discriminator."""
FLOPS_PER_SECOND = Metric(
    "loupe_flops_per_second", "gauge", "Counted operations a second and rank, last interval, frozen networks included."
)
PEAK_FLOPS = Metric(
    "loupe_device_peak_flops",
    "gauge",
    "Operations a second that the device can do, and where that is from.",
    ("source",),
)
MFU = Metric("loupe_mfu_ratio", "gauge", "Counted operations a second over the device's peak, last interval.")
RANKS_STEP = Metric(
    "loupe_ranks_step_seconds", "gauge", "Mean step time of the last interval: min, mean and max over ranks.", ("stat",)
)
RANKS_DATA_WAIT = Metric(
    "loupe_ranks_data_wait_seconds",
    "gauge",
    "Wait for data a step, last interval: min, mean, max over ranks.",
    ("stat",),
)
RANKS_MEMORY = Metric(
    "loupe_ranks_peak_memory_bytes", "gauge", "Peak memory of ranks: min, mean and max over them.", ("stat",)
)
PHASE = Metric("loupe_phase", "gauge", "Index of the phase that is being trained, by its name.", ("phase",))
LAST_STEP = Metric("loupe_last_step_timestamp_seconds", "gauge", "When the last step ended, Unix time.")
CHECKPOINT_LAST = Metric(
    "loupe_checkpoint_last_success_timestamp_seconds", "gauge", "When the newest checkpoint was committed, Unix time."
)
CHECKPOINT_SECONDS = Metric(
    "loupe_checkpoint_seconds", "histogram", "Time training stood still for a save.", (),
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)  # fmt: skip
CHECKPOINT_DURATION = Metric(
    "loupe_checkpoint_duration_seconds",
    "gauge",
    "From the begin of the newest save to its COMMIT, in the background too.",
)
CHECKPOINT_BYTES = Metric("loupe_checkpoint_bytes", "gauge", "Size of the newest checkpoint.")
CHECKPOINT_INTERVAL = Metric(
    "loupe_checkpoint_interval_seconds", "gauge", "Time between two checkpoints at the speed of the last interval."
)
RESTORE_SECONDS = Metric("loupe_restore_seconds", "gauge", "What this start's restore took.")
CHECKPOINT_FAILURES = Metric(
    "loupe_checkpoint_failures_total", "counter", "Failed checkpoint saves or restores.", ("operation",)
)
RESTARTS = Metric(
    "loupe_restarts_total", "counter", "Times this run has been started again, by reason: preempted, crash, hang, ...",
    ("reason",),
)  # fmt: skip
RESTARTS_LEFT = Metric("loupe_restarts_left_ratio", "gauge", "Share of the restart budget that is left.")
RESTARTS_IN_PLACE = Metric(
    "loupe_restarts_without_checkpoint",
    "gauge",
    "Restarts in a row that have seen no newer checkpoint; the third ends the run.",
)
GOODPUT_STATES = (
    "productive", "init", "compile", "data", "checkpoint", "restore", "rework", "hang", "down", "other",
)  # fmt: skip
"""`other`: samples, evaluations, the end. They sum to the run's time since its first start."""
GOODPUT = Metric(
    "loupe_goodput_seconds_total",
    "counter",
    "Time of this run since its first start, over all starts, by state.",
    ("state",),
)
START_SECONDS = Metric(
    "loupe_start_seconds", "gauge",
    "Time from the start of this process to the end of its first step, by part: import, ranks, data, model, restore, "
    "first_batch, compile, first_step.", ("part",),
)  # fmt: skip
FIRST_STEP = Metric(
    "loupe_first_step_timestamp_seconds", "gauge", "When this start's first step ended, Unix time; 0 before."
)
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
FETCH_ERROR_KINDS = ("denied", "missing", "damaged", "timeout", "server")
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
DISCOVERY_FAILURES = Metric(
    "loupe_discovery_failures_total", "counter", "Failed writes of the targets file that Prometheus finds this run by."
)
SINK_FAILURES = Metric(
    "loupe_sink_failures_total", "counter", "Records that another sink of metrics did not take.", ("sink",)
)
JOB = Metric("loupe_job", "info", "Run, recipe, cluster, job and node of this process.")
BUILD = Metric("loupe_build", "info", "Version of the code and of torch.")

STAGE_ITEM_STATES = ("waiting", "working", "done", "failed", "given_up")
DATA_STAGE_ITEMS = Metric(
    "loupe_data_stage_items", "gauge",
    "Items (shards, or runs of them) of a data stage's pass, by state: waiting, working, done, failed, given_up; all workers.",
    ("stage", "pass", "state"),
)  # fmt: skip
DATA_STAGE_SAMPLES = Metric(
    "loupe_data_stage_samples_total", "counter",
    "Samples of a data stage's finished items, by result: read, kept, or the reason why not.", ("stage", "pass", "result"),
)  # fmt: skip
DATA_STAGE_COUNTS = Metric(
    "loupe_data_stage_counts_total", "counter",
    "What else a data stage counts in its finished items: captions, faces, blurred, captions_cut, ...",
    ("stage", "pass", "what"),
)  # fmt: skip
DATA_STAGE_TOKENS = Metric(
    "loupe_data_stage_tokens_total",
    "counter",
    "Tokens that a data stage has written in its finished items.",
    ("stage",),
)
DATA_STAGE_BYTES = Metric(
    "loupe_data_stage_bytes_total",
    "counter",
    "Bytes of files that a data stage's finished items have published.",
    ("stage",),
)
DATA_STAGE_IN_WORK = Metric(
    "loupe_data_stage_samples_in_work", "gauge", "Samples done so far of items that are being worked at.", ("stage",)
)
DATA_STAGE_SPEED = Metric(
    "loupe_data_stage_samples_per_second",
    "gauge",
    "Samples a second of all workers, over the last two minutes.",
    ("stage",),
)
DATA_STAGE_WORKERS = Metric(
    "loupe_data_stage_workers", "gauge", "Workers that hold an item of this stage now.", ("stage",)
)
DATA_STAGE_DEATHS = Metric(
    "loupe_data_stage_worker_deaths_total",
    "counter",
    "Workers on this machine that died and were replaced.",
    ("stage",),
)
DATA_STAGE_LOOKED = Metric(
    "loupe_data_stage_looked_timestamp_seconds", "gauge",
    "When these figures were last read from the stage's folder, Unix time.", ("stage",),
)  # fmt: skip

ALL = tuple(value for value in globals().values() if isinstance(value, Metric))
OF_STAGES = (*(metric for metric in ALL if metric.name.startswith("loupe_data_stage_")), JOB, BUILD)
"""Exported by `loupe data` commands, and by nothing else."""
OF_EVERY_RANK = (
    DATA_WAIT, SHARD_WAIT, FETCH_SECONDS, FETCH_BYTES, FETCH_ERRORS, CACHE_HITS, CACHE_MISSES, CACHE_EVICTIONS, CACHE_BYTES,
    CAPTIONS_CUT, OWN_SECONDS, OWN_RATIO, PEAK_MEMORY, START_SECONDS, JOB, BUILD,
)  # fmt: skip
"""Each rank exports its own."""
OF_RANK_0 = tuple(metric for metric in ALL if metric in OF_EVERY_RANK or metric not in OF_STAGES)
"""And the run's, which rank 0 alone exports: on the others they would stand at 0, as if nothing had ever been saved."""
