"""Checkpoints and recovery: what would be lost now, what saving costs, how runs came back, and what that took."""

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from ops.dashboards import expressions as ask
from ops.dashboards.board import Mark, Section, board, variable
from ops.dashboards.expressions import RUNS, of_run, or_zero, rate, series
from ops.dashboards.kit import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    STATE_COLORS,
    YELLOW,
    Column,
    Look,
    PanelBuilder,
    Query,
    bars,
    curves,
    number,
    rows,
)
from trainer import metric_names as names

_ENOUGH = 'state="productive"'
_PART_COLORS = {
    "import": "#8AB8FF", "ranks": "#FFCB7D", "data": "#E0B400", "model": "#3274D9", "restore": "#FFB357",
    "first_batch": "#FF780A", "compile": "#B877D9", "first_step": "#37872D",
}  # fmt: skip


def build() -> models.Dashboard:
    info = ask.info(RUNS)
    before = f"last_over_time({info}[1h] offset 1m)"
    return board(
        uid="loupe-recovery",
        title="Loupe / Checkpoints and recovery",
        description="What would be lost now, what saving costs, how runs came back, and what that took.",
        variables=[variable("run", "Run", names.STEP.name)],
        since="now-24h",
        marks=[
            Mark(
                "Starts",
                f"count by (run, start) ({info}) unless count by (run, start) ({before})",
                "start {{start}} of {{run}}",
                ORANGE,
            )
        ],
        sections=[
            Section("Checkpoints", _checkpoints()),
            Section("Restarts", _restarts()),
            Section("What it costs", _costs()),
        ],
    )


def _checkpoints() -> list[PanelBuilder]:
    age, interval = ask.age(names.CHECKPOINT_LAST, RUNS), of_run(names.CHECKPOINT_INTERVAL, RUNS)
    failures = or_zero(of_run(names.CHECKPOINT_FAILURES, RUNS, by="run, operation"), RUNS, "operation", "none")
    stood = rate(names.CHECKPOINT_SECONDS, RUNS, part="sum")
    return [
        number(Look("Oldest newest checkpoint", "Of the runs chosen, in intervals between two checkpoints.",
                    "suffix: intervals", 6,
                    5, mend="checkpoint-old", decimals=2, steps=((None, GREEN), (2, YELLOW), (3, RED)),
                    none="no checkpoint yet"),
               f"max(({age}) / on (run) ({interval} > 0))"),
        number(Look("Failed", "Saves and restores, in all starts. A restore that failed has set a damaged checkpoint "
                    "aside.",
                    units.Short, 6, 5, mend="checkpoint-failing", steps=((None, GREEN), (1, RED)), none="no run"),
               f"sum({or_zero(of_run(names.CHECKPOINT_FAILURES, RUNS, by='run, operation'), RUNS)})"),
        number(Look("Time spent on saving", "Share of their time that runs stand still for saves.", units.PercentUnit, 6, 5,
                    decimals=2, minimum=0, steps=((None, GREEN), (0.02, YELLOW), (0.05, RED)), none="no run"),
               f"max({stood})", sparkline=True),
        number(Look("Restarts without a newer checkpoint", "In a row. The third ends the run.", units.Short, 6, 5,
                    mend="no-newer-checkpoint", steps=((None, GREEN), (1, YELLOW), (2, RED)), none="no run"),
               f"max({of_run(names.RESTARTS_IN_PLACE, RUNS)})"),
        curves(Look("Age of the newest checkpoint", "Against three intervals between two, where the alert begins.",
                    units.Seconds, 12,
                    8, mend="checkpoint-old", minimum=0, none="no checkpoint yet"),
               Query(age, "{{run}}"), Query(f"3 * {interval}", "three intervals of {{run}}")),
        curves(Look("What a save takes", "stood still: training waited so long, mean of the saves between two scrapes. "
                    "until COMMIT: "
                    "the newest save, its part in the background included.", units.Seconds, 12, 8, minimum=0,
                    none="no checkpoint yet"),
               Query(f"{stood} / on (run) ({rate(names.CHECKPOINT_SECONDS, RUNS, part='count')} > 0)",
               "stood still {{run}}"),
               Query(of_run(names.CHECKPOINT_DURATION, RUNS), "until COMMIT {{run}}"), points=True),
        curves(Look("Size", "Of the newest checkpoint.", units.BytesIEC, 8, 7, minimum=0),
               Query(of_run(names.CHECKPOINT_BYTES, RUNS), "{{run}}")),
        curves(Look("Failures", "Saves and restores that failed, over all starts.", units.Short, 8, 7,
                    mend="checkpoint-failing",
                    minimum=0), Query(failures, "{{operation}} {{run}}")),
        curves(Look("Newest restore", "Seconds that the newest start's restore took; 0 where there was nothing to restore.",
                    units.Seconds, 8, 7, minimum=0), Query(of_run(names.RESTORE_SECONDS, RUNS), "{{run}}"), points=True),
    ]  # fmt: skip


def _restarts() -> list[PanelBuilder]:
    by_reason = or_zero(of_run(names.RESTARTS, RUNS, by="run, reason"), RUNS, "reason", "none")
    return [
        curves(Look("Restarts by reason", "Over all starts. preempted and time limit are as planned; crash, hang and "
                    "bad node count "
                    "against the budget.", units.Short, 8, 8, mend="restart-storm", minimum=0),
               Query(by_reason, "{{reason}} {{run}}"), stacked=True),
        curves(Look("Restart budget", "Share that is left. It fills up again after a day of steps that stand.",
                    units.PercentUnit, 8,
                    8, mend="restart-budget", minimum=0, maximum=1, steps=((None, RED), (0.2, YELLOW), (0.5, GREEN))),
               Query(of_run(names.RESTARTS_LEFT, RUNS), "{{run}}"), limits=True),
        curves(Look("Hangs, roll-backs, dead data workers", "Over all starts.", units.Short, 8, 8, mend="hang", minimum=0),
               Query(of_run(names.HANGS, RUNS), "hangs {{run}}"),
               Query(of_run(names.ROLL_BACKS, RUNS), "roll-backs {{run}}"),
               Query(of_run(names.WORKER_DEATHS, RUNS), "data workers {{run}}")),
        rows(Look("Starts", "The start that each run is in now. Steps for: since its first step ended.", units.Short,
                  24, 6, none="no run"),
             [Column("run", "Run", link=("Open the run", "/d/loupe-run?var-run=${__value.text}&${__url_time_range}")),
              Column("start", "Start"), Column("job_id", "Job"), Column("cluster", "Cluster"), Column("host",
              "Host of rank 0"),
              Column("steps_for", "Steps for", units.DurationSeconds, decimals=0), Column("folder", "Folder")],
             Query(ask.info(RUNS), "one"), Query(ask.age(names.FIRST_STEP, RUNS), "steps_for"), by="run", sort="Run"),
    ]  # fmt: skip


def _costs() -> list[PanelBuilder]:
    states = of_run(names.GOODPUT, RUNS, by="run, state")
    lost = of_run(names.GOODPUT, RUNS, 'state!="productive"', by="run, state")
    parts = f'max by (run, part) ({series(names.START_SECONDS, RUNS)})'  # fmt: skip
    return [
        number(Look("Goodput", "Share of time in which steps were made that stand: of all runs chosen, since their "
                    "first starts.",
                    units.PercentUnit, 6, 8, mend="goodput", decimals=1, minimum=0, maximum=1,
                    steps=((None, RED), (0.7, YELLOW), (0.9, GREEN)), none="no run"),
               f"sum({of_run(names.GOODPUT, RUNS, _ENOUGH)}) / sum({states})"),
        curves(Look("Goodput, stacked", "Share of the time since the first start by what runs did, over all starts. "
                    "Time between a "
                    "job's end and the next one's submission by hand does not count.", units.PercentUnit, 18, 8, minimum=0,
                    maximum=1, colors=STATE_COLORS),
               Query(f"sum by (state) ({states}) / on () group_left () sum({states})", "{{state}}"), stacked=True),
        curves(Look("Lost time", "Seconds since the first start that did not bring runs on, by what they did.",
                    units.Seconds, 12, 8,
                    minimum=0, colors=STATE_COLORS), Query(f"sum by (state) ({lost})", "{{state}}"), stacked=True),
        bars(Look("Newest start by part", "Seconds until the end of its first step, of the slowest rank in each part.",
                  units.Seconds, 6, 8, mend="slow-start", minimum=0, colors=_PART_COLORS),
             Query(f"max by (part) ({parts})", "{{part}}")),
        curves(Look("Starts by part", "The same over time: a start a step of the stairs.", units.Seconds, 6, 8, minimum=0,
                    colors=_PART_COLORS), Query(f"max by (part) ({parts})", "{{part}}"), stacked=True),
        curves(Look("Repeated work", "Steps done over steps that stand: 1 where no step has been done twice.",
                    units.Short, 12, 6,
                    minimum=1, decimals=3),
               Query(f"{of_run(names.STEPS, RUNS)} / on (run) ({of_run(names.STEP, RUNS)} > 0)", "{{run}}")),
        number(Look("Rank-hours lost", "Hours that did not bring runs on, times their present number of ranks.",
                    units.Short, 6, 6,
                    decimals=1, steps=((None, GREY),), none="no run"),
               f"sum(sum by (run) ({lost}) / 3600 * on (run) {of_run(names.WORLD_SIZE, RUNS)})"),
        number(Look("Rank-hours", "Of all runs chosen, since their first starts.", units.Short, 6, 6, decimals=1,
                    steps=((None, BLUE),), none="no run"), f"sum({ask.rank_hours(RUNS)})"),
    ]  # fmt: skip
