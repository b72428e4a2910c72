"""Fleet: all runs, and the alerts that fire."""

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from ops.dashboards import expressions as ask
from ops.dashboards.board import Section, board, variable
from ops.dashboards.expressions import RUNS, of_run, or_zero, rate, series
from ops.dashboards.kit import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Look,
    PanelBuilder,
    Query,
    curves,
    number,
    rows,
    words,
)
from trainer import metric_names as names

_SEEN = "last_over_time({}[$__range])"
"""What a run said last: one that has ended is listed as long as it lies in the dashboard's time."""


def build() -> models.Dashboard:
    return board(
        uid="loupe-fleet",
        title="Loupe / Fleet",
        description="All runs that Prometheus has seen in the time chosen, and the alerts that fire.",
        variables=[variable("run", "Run", names.STEP.name)],
        since="now-24h",
        sections=[
            Section("Now", _now()),
            Section("Runs", [_runs()]),
            Section("Alerts", [_alerts()]),
            Section("Over time", _over_time()),
        ],
    )


def _seen(metric: names.Metric, *more: str, by: str = "run") -> str:
    """Of the start that answers; of one that is away, as it was last seen. What earlier starts said may be more."""
    one = series(metric, RUNS, *more)
    return f"(max by ({by}) ({one}) or max by ({by}) ({_SEEN.format(one)}) unless on (run) max by (run) ({one}))"


def _now() -> list[PanelBuilder]:
    down = f"count by (run) (up{{{RUNS}}} == 0)"
    firing = 'count(ALERTS{alertstate="firing", severity="%s"})'
    zero = "or on () 0 * sum(up)"
    return [
        number(Look("Runs training", "Runs whose last step is recent: younger than 20 steps, or five minutes.",
                    units.Short, 4, 4,
                    steps=((None, GREY), (1, GREEN)), none="no run"), f"count(({ask.state(RUNS)}) == 2) {zero}"),
        number(Look("Runs stalled", "Runs that answer and have made no step for longer than that.", units.Short, 4, 4,
                    mend="no-progress", steps=((None, GREEN), (1, RED)), none="no run"),
               f"count(({ask.state(RUNS)}) == 0) {zero}"),
        number(Look("Ranks that answer", "Of all processes that Prometheus is told to ask.", units.PercentUnit, 4, 4,
                    mend="target-down", decimals=1, minimum=0, maximum=1, steps=((None, RED), (0.999, GREEN)),
                    none="no rank"),
               f"avg(up{{{RUNS}}})", ),
        number(Look("Runs with ranks that do not answer", "A rank that was killed, or a node that cannot be reached.",
                    units.Short,
                    4, 4, mend="target-down", steps=((None, GREEN), (1, RED)), none="no run"), f"count({down}) {zero}"),
        number(Look("Critical alerts", "That fire now.", units.Short, 4, 4, steps=((None, GREEN), (1, RED)), none="no run"),
               f"{firing % 'critical'} {zero}"),
        number(Look("Warnings", "That fire now.", units.Short, 4, 4, steps=((None, GREEN), (1, YELLOW)), none="no run"),
               f"{firing % 'warning'} {zero}"),
    ]  # fmt: skip


def _runs() -> PanelBuilder:
    ended = f"-1 + 0 * {_seen(names.STEP)}"
    columns = [
        Column("run", "Run", link=("Open the run", "/d/loupe-run?var-run=${__value.text}&${__url_time_range}"), width=220),
        Column("state", "State", mappings=[words(ask.STATE_WORDS)],
               steps=((None, ORANGE), (0, RED), (1, BLUE), (2, GREEN)), width=100),
        Column("phase", "Phase"),
        Column("step", "Step", units.LocaleFormat, decimals=0),
        Column("done", "Done", units.PercentUnit, decimals=1),
        Column("left", "Time left", units.DurationSeconds, decimals=0),
        Column("speed", "Images/s", decimals=1),
        Column("mfu", "MFU", units.PercentUnit, decimals=1, steps=((None, RED), (0.15, YELLOW), (0.3, GREEN))),
        Column("goodput", "Goodput", units.PercentUnit, decimals=1, steps=((None, RED), (0.7, YELLOW), (0.9, GREEN))),
        Column("ranks", "Ranks"),
        Column("hours", "Rank-hours", decimals=1),
        Column("checkpoint", "Checkpoint age", units.DurationSeconds, decimals=0),
        Column("restarts", "Restarts", steps=((None, GREEN), (1, YELLOW), (5, RED))),
        Column("alerts", "Alerts", steps=((None, GREEN), (1, RED))),
    ]  # fmt: skip
    queries = [
        Query(f"({ask.state(RUNS)}) or on (run) ({ended})", "state"),
        # the phase that is trained now has the largest index of those seen
        Query(f"topk by (run) (1, {_seen(names.PHASE, by='run, phase')})", "in_phase"),
        Query(_seen(names.STEP), "step"),
        Query(f"{_seen(names.STEP)} / on (run) {_seen(names.PLANNED_STEPS)}", "done"),
        Query(ask.eta(RUNS), "left"),
        Query(of_run(names.IMAGES_PER_SECOND, RUNS), "speed"),
        Query(of_run(names.MFU, RUNS), "mfu"),
        Query(
            f"{_seen(names.GOODPUT, _PRODUCTIVE)} / on (run) sum by (run) ({_seen(names.GOODPUT, by='run, state')})",
            "goodput",
        ),
        Query(_seen(names.WORLD_SIZE), "ranks"),
        Query(
            f"sum by (run) ({_seen(names.GOODPUT, by='run, state')}) / 3600 * on (run) {_seen(names.WORLD_SIZE)}",
            "hours",
        ),
        Query(f"time() - ({_seen(names.CHECKPOINT_LAST)} > 0)", "checkpoint"),
        Query(
            f"sum by (run) ({_seen(names.RESTARTS, by='run, reason')}) or on (run) 0 * {_seen(names.STEP)}", "restarts"
        ),
        Query(f'count by (run) (ALERTS{{alertstate="firing", {RUNS}}}) or on (run) 0 * {_seen(names.STEP)}', "alerts"),
    ]
    look = Look(
        "Runs",
        "A line a run, of all that have been seen in the time chosen. no answer: it has ended, is queued, or rank 0 "
        "cannot be "
        "asked; its other figures are what it said last. Rank-hours: time since the first start times the present "
        "number of "
        "ranks.",
        units.Short, 24, 12, none="no run",
    )  # fmt: skip
    return rows(look, columns, *queries, by="run", sort="State", descending=True)


_PRODUCTIVE = 'state="productive"'


def _alerts() -> PanelBuilder:
    columns = [
        Column("alertname", "Alert", width=260),
        Column("severity", "Severity", width=100),
        Column("run", "Run", link=("Open the run", "/d/loupe-run?var-run=${__value.text}&${__url_time_range}")),
        Column("node", "Node"),
        Column("rank", "Rank"),
        Column("firing", "Since", units.DurationSeconds, decimals=0),
    ]
    expression = (
        'max by (alertname, severity, run, node, rank) (time() - ALERTS_FOR_STATE) '
        'and on (alertname, severity, run, node, rank) max by (alertname, severity, run, node, rank) '
        '(ALERTS{alertstate="firing"})'
    )  # fmt: skip
    look = Look(
        "Alerts that fire", "Their sections in the runbook say what they mean and what to do. Watchdog always fires: "
        "it shows "
        "that alerts get through.", units.Short, 24, 7, mend="watchdog", none="none fires; not even Watchdog: are the "
        "rules loaded?",
    )  # fmt: skip
    return rows(look, columns, Query(expression, "firing"), by="alertname", sort="Severity")


def _over_time() -> list[PanelBuilder]:
    return [
        curves(Look("Images a second", "Of each run.", "suffix: /s", 8, 8, minimum=0),
               Query(of_run(names.IMAGES_PER_SECOND, RUNS), "{{run}}")),
        curves(Look("MFU", "Of each run.", units.PercentUnit, 8, 8, mend="mfu-drop", minimum=0),
               Query(of_run(names.MFU, RUNS), "{{run}}")),
        curves(Look("Goodput, last hour", "Of each run: share of time in which steps were made that stand.",
                    units.PercentUnit, 8,
                    8, minimum=0, maximum=1), Query(ask.recent_goodput(RUNS), "{{run}}")),
        curves(Look("Ranks", "That answer, by run.", units.Short, 8, 8, mend="target-down", minimum=0),
               Query(f"sum by (run) (up{{{RUNS}}})", "{{run}}"), stacked=True),
        curves(Look("Restarts", "An hour, of each run.", "suffix: /h", 8, 8, mend="restart-storm", minimum=0),
               Query(ask.grown_by(ask.restarts(RUNS), "1h:1m"), "{{run}}")),
        curves(Look("Wait for data", "Share of their time that ranks wait for a batch, mean over ranks.",
                    units.PercentUnit, 8, 8,
                    mend="data-wait", minimum=0), Query(rate(names.DATA_WAIT, RUNS, how="avg"), "{{run}}")),
        curves(Look("Metrics that went astray", "Failed writes of discovery files, and records that other sinks did "
                    "not take, an "
                    "hour. Training goes on.", "suffix: /h", 24, 6, mend="discovery-failing", minimum=0),
               Query(f"3600 * {rate(names.DISCOVERY_FAILURES, RUNS)}", "discovery {{run}}"),
               Query(f"3600 * ({or_zero(rate(names.SINK_FAILURES, RUNS, by='run, sink'), RUNS, 'sink', 'no sink failed')})",
                     "{{sink}} {{run}}")),
    ]  # fmt: skip
