"""Data: the stream that training reads, and the stages that make it."""

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from ops.dashboards.board import Section, board, variable
from ops.dashboards.expressions import RUNS, WINDOW, of_run, or_zero, rate, series
from ops.dashboards.kit import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    STAT_COLORS,
    YELLOW,
    Column,
    Look,
    PanelBuilder,
    Query,
    curves,
    number,
    rows,
)
from trainer import metric_names as names
from trainer.metric_names import Metric

_RANKS = f'{RUNS}, rank=~"$rank"'
_STAGES = 'stage=~"$stage"'
_ITEM_COLORS = {
    "waiting": "#8E8E8E",
    "working": "#3274D9",
    "done": "#37872D",
    "failed": "#FF780A",
    "given_up": "#C4162A",
}


def build() -> models.Dashboard:
    return board(
        uid="loupe-data",
        title="Loupe / Data",
        description="The stream of samples that training reads, and the stages that make one from raw images.",
        variables=[
            variable("run", "Run", names.STEP.name),
            variable("rank", "Rank", f'{names.DATA_WAIT.name}{{run=~"$run"}}'),
            variable("stage", "Stage", names.DATA_STAGE_ITEMS.name),
        ],
        sections=[
            Section("Stream", _stream()),
            Section("Samples", _samples()),
            Section("Stages", _stages()),
        ],
    )


def _stream() -> list[PanelBuilder]:
    wait = rate(names.DATA_WAIT, _RANKS, how="max")
    hits, misses = rate(names.CACHE_HITS, _RANKS), rate(names.CACHE_MISSES, _RANKS)
    errors = or_zero(rate(names.FETCH_ERRORS, _RANKS, by="run, error"), RUNS, "error", "no error")
    return [
        number(Look("Wait for data", "Share of its time that the rank which waits longest waits for a batch.",
                    units.PercentUnit, 6,
                    5, mend="data-wait", decimals=1, minimum=0, steps=((None, GREEN), (0.05, YELLOW), (0.2, RED)),
                    none="no run"), f"max({wait})", sparkline=True),
        number(Look("Fetched", "Bytes a second that all data workers fetch from storage. 0: all shards lie in the "
                    "caches, or the "
                    "data lies on a local disk.", units.BytesPerSecondIEC, 6, 5, steps=((None, GREY),), none="no run"),
               f"sum({rate(names.FETCH_BYTES, _RANKS)})", sparkline=True),
        number(Look("Errors of storage", "Failed reads a minute, tried again or not.", "suffix: /min", 6, 5,
                    mend="storage-errors",
                    decimals=2, steps=((None, GREEN), (0.01, YELLOW), (1, RED)), none="no run"), f"60 * sum({errors})"),
        number(Look("Bad samples", "Replaced because they could not be read, of a million samples.", units.Short, 6, 5,
                    mend="bad-samples", decimals=1, steps=((None, GREEN), (100, YELLOW), (1000, RED)), none="no run"),
               f"1000000 * sum({or_zero(of_run(names.BAD_SAMPLES, RUNS, by='run, reason'), RUNS)}) "
               f"/ clamp_min(sum({of_run(names.IMAGES, RUNS)}), 1)"),
        curves(Look("Wait for data", "Share of its time that a rank waits for a batch, mean and longest over ranks.",
                    units.PercentUnit, 8, 8, mend="data-wait", minimum=0, steps=((None, GREEN), (0.05, YELLOW), (0.2,
                    RED))),
               Query(rate(names.DATA_WAIT, _RANKS, how="avg"), "mean {{run}}"), Query(wait, "longest {{run}}"),
               limits=True),
        curves(Look("Wait a step, over ranks", "Seconds, last interval.", units.Seconds, 8, 8, mend="data-wait", minimum=0,
                    colors=STAT_COLORS), Query(of_run(names.RANKS_DATA_WAIT, RUNS, by="run, stat"), "{{stat}}")),
        curves(Look("Where data workers' time goes", "Seconds a second, all workers: fetching from storage, and "
                    "waiting for a shard "
                    "that they had to read.", units.Seconds, 8, 8, minimum=0),
               Query(rate(names.FETCH_SECONDS, _RANKS), "fetching {{run}}"),
               Query(rate(names.SHARD_WAIT, _RANKS), "waiting for a shard {{run}}")),
        curves(Look("Fetched from storage", "Bytes a second.", units.BytesPerSecondIEC, 6, 8, minimum=0),
               Query(rate(names.FETCH_BYTES, _RANKS), "{{run}}")),
        curves(Look("Speed of a fetch", "Bytes over the seconds that fetching took: of one connection.",
                    units.BytesPerSecondIEC,
                    6, 8, mend="data-wait", minimum=0, none="nothing was fetched"),
               Query(f"{rate(names.FETCH_BYTES, _RANKS)} / on (run) ({rate(names.FETCH_SECONDS, _RANKS)} > 0) "
                     f"or on (run) 0 * {of_run(names.STEP, RUNS)}", "{{run}}")),
        curves(Look("Errors of storage", "Failed reads a minute, by kind: denied and missing will not go away by "
                    "themselves.",
                    "suffix: /min", 6, 8, mend="storage-errors", minimum=0), Query(f"60 * ({errors})",
                    "{{error}} {{run}}")),
        curves(Look("Cache: hits", "Share of opened shards that lay in the node's cache. None are opened while there "
                    "is no line.",
                    units.PercentUnit, 6, 8, minimum=0, maximum=1, none="no cache in use"),
               Query(f"{hits} / on (run) ({hits} + on (run) {misses})", "{{run}}")),
        curves(Look("Cache: size", "Bytes of shards in the largest node's cache.", units.BytesIEC, 6, 7, minimum=0),
               Query(f"max by (run) ({series(names.CACHE_BYTES, _RANKS)})", "{{run}}")),
        curves(Look("Cache: shards in and out", "A minute. Evictions as frequent as fetches: the cache is too small "
                    "for the order "
                    "in which shards are read.", "suffix: /min", 6, 7, minimum=0),
               Query(f"60 * {misses}", "fetched {{run}}"),
               Query(f"60 * {rate(names.CACHE_EVICTIONS, _RANKS)}", "evicted {{run}}")),
        curves(Look("Data workers that died", "Over all starts of the run.", units.Short, 6, 7, mend="data-workers",
                    minimum=0),
               Query(of_run(names.WORKER_DEATHS, RUNS), "{{run}}")),
        curves(Look("Bad shards", "That the run leaves out.", units.Short, 6, 7, mend="bad-shards", minimum=0),
               Query(of_run(names.BAD_SHARDS, RUNS), "{{run}}")),
    ]  # fmt: skip


def _samples() -> list[PanelBuilder]:
    bad = or_zero(of_run(names.BAD_SAMPLES, RUNS, by="run, reason"), RUNS, "reason", "none")
    return [
        curves(Look("Samples replaced", "Because they could not be read, over all starts, by reason.", units.Short, 12, 7,
                    mend="bad-samples", minimum=0), Query(bad, "{{reason}} {{run}}")),
        curves(Look("Captions cut", "A minute: longer than the text encoder takes.", "suffix: /min", 12, 7, minimum=0),
               Query(f"60 * {rate(names.CAPTIONS_CUT, _RANKS)}", "{{run}}")),
    ]  # fmt: skip


def _of_stage(metric: Metric, *more: str, by: str = "stage") -> str:
    """All processes of a stage say the same of it."""
    return f"max by ({by}) ({series(metric, _STAGES, *more)})"


def _stage_rate(metric: Metric, *more: str, by: str = "stage") -> str:
    return f"max by ({by}) (rate({series(metric, _STAGES, *more)}[{WINDOW}]))"


def _stages() -> list[PanelBuilder]:
    items = _of_stage(names.DATA_STAGE_ITEMS, by="stage, pass, state")
    done = f"sum by (stage) ({_of_stage(names.DATA_STAGE_ITEMS, _DONE, by='stage, pass, state')})"
    return [
        rows(Look("Stages", "A line a stage that runs, or ran in a process that still answers.", units.Short, 24, 7,
                  mend="data-stage-failing", none="no stage runs"),
             [Column("stage", "Stage"),
              Column("done", "Items done", units.PercentUnit, decimals=1, steps=((None, BLUE), (1, GREEN))),
              Column("failed", "Failed or given up", steps=((None, GREEN), (1, RED))),
              Column("speed", "Samples/s", decimals=1),
              Column("workers", "Workers"),
              Column("deaths", "Workers died", steps=((None, GREEN), (1, ORANGE))),
              Column("bytes", "Published", units.BytesIEC),
              Column("looked", "Figures' age", units.DurationSeconds, decimals=0)],
             Query(f"{done} / on (stage) sum by (stage) ({items})", "done"),
             Query(f"sum by (stage) ({_of_stage(names.DATA_STAGE_ITEMS, _FAILED, by='stage, pass, state')})", "failed"),
             Query(_of_stage(names.DATA_STAGE_SPEED), "speed"),
             Query(_of_stage(names.DATA_STAGE_WORKERS), "workers"),
             Query(f"sum by (stage) ({series(names.DATA_STAGE_DEATHS, _STAGES)})", "deaths"),
             Query(_of_stage(names.DATA_STAGE_BYTES), "bytes"),
             Query(f"time() - {_of_stage(names.DATA_STAGE_LOOKED)}", "looked"), by="stage", sort="Stage"),
        curves(Look("Items by state", "Shards, or runs of them, of all passes.", units.Short, 8, 8,
                    mend="data-stage-failing",
                    minimum=0, colors=_ITEM_COLORS), Query(f"sum by (state) ({items})", "{{state}}"), stacked=True),
        curves(Look("Samples a second", "Of all workers, over the last two minutes.", "suffix: /s", 8, 8, minimum=0),
               Query(_of_stage(names.DATA_STAGE_SPEED), "{{stage}}")),
        curves(Look("Samples in work", "Done so far, of items that are not finished.", units.Short, 8, 8, minimum=0),
               Query(_of_stage(names.DATA_STAGE_IN_WORK), "{{stage}}")),
        curves(Look("Samples by result", "Of finished items: read, kept, or why not.", units.Short, 8, 8, minimum=0),
               Query(_of_stage(names.DATA_STAGE_SAMPLES, by="stage, pass, result"), "{{stage}} {{pass}} {{result}}")),
        curves(Look("Tokens a second", "That recaptioning has written, whenever an item is finished.", "suffix: /s", 8, 8,
                    minimum=0), Query(_stage_rate(names.DATA_STAGE_TOKENS), "{{stage}}")),
        curves(Look("What else is counted", "Captions, faces, what was blurred or cut, of finished items.", units.Short,
                    8, 8,
                    minimum=0), Query(_of_stage(names.DATA_STAGE_COUNTS, by="stage, pass, what"),
                    "{{stage}} {{pass}} {{what}}")),
    ]  # fmt: skip


_DONE = 'state="done"'
_FAILED = 'state=~"failed|given_up"'
