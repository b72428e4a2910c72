"""What dashboards ask Prometheus. Metrics are named by `metric_names` alone, so a renamed one is missed when this is imported.

A run's own series go on over its restarts, from other addresses: so they are taken together by `max by (run)`.
"""

from trainer import metric_names as names
from trainer.metric_names import Metric

ONE_RUN = 'run="$run", job_id=~"$job"'
RUNS = 'run=~"$run"'
RANKS = f'{ONE_RUN}, rank=~"$rank"'
WINDOW = "$__rate_interval"


def series(metric: Metric, select: str, *more: str, part: str = "") -> str:
    """
    Args:
        select: which runs.
        more: other matchers.
        part: of a histogram: bucket, sum or count; of info: `info`.
    """
    name = f"{metric.name}_{part}" if part else metric.name
    return f"{name}{{{', '.join(one for one in (select, *more) if one)}}}"


def of_run(metric: Metric, select: str, *more: str, by: str = "run") -> str:
    """A gauge or counter that rank 0 alone sets."""
    return f"max by ({by}) ({series(metric, select, *more)})"


def rate(metric: Metric, select: str, *more: str, by: str = "run", how: str = "sum", part: str = "") -> str:
    return f"{how} by ({by}) (rate({series(metric, select, *more, part=part)}[{WINDOW}]))"


def or_zero(expression: str, select: str, label: str = "", text: str = "none so far") -> str:
    """0 where nothing has been counted yet and the run is there. Of a chart by `label`, the line of 0 is called `text`."""
    zero = f"0 * {of_run(names.STEP, select)}"
    if label:
        zero = f'label_replace({zero}, "{label}", "{text}", "", "")'
    return f"({expression}) or on (run) {zero}"


def step_limit(select: str) -> str:
    """Seconds after which a run that steps must have stepped again, for the eye: 20 of its steps, five minutes at least."""
    slowest = of_run(names.RANKS_STEP, select, 'stat="max"')
    return f"clamp_min(20 * ({slowest} or {of_run(names.LAST_STEP, select)} * 0), 300)"


def state(select: str) -> str:
    """0: it steps no more; 1: it has not begun to step; 2: it trains."""
    last = of_run(names.LAST_STEP, select)
    return f"2 * (time() - {last} < bool {step_limit(select)}) + ({last} == bool 0)"


STATE_WORDS = {0: ("stalled", "red"), 1: ("starting", "blue"), 2: ("training", "green"), -1: ("no answer", "orange")}


def step_seconds(select: str) -> str:
    """Seconds a step by stage; they sum to a step."""
    per_stage = rate(names.STEP_SECONDS, select, 'stage!="total"', by="run, stage", part="sum")
    steps = rate(names.STEP_SECONDS, select, 'stage="total"', part="count")
    return f"{per_stage} / on (run) group_left () {steps}"


def step_quantile(share: float, select: str) -> str:
    buckets = rate(names.STEP_SECONDS, select, 'stage="total"', by="run, le", part="bucket")
    return f"histogram_quantile({share}, {buckets})"


def goodput(select: str) -> str:
    """Share of the time since the run's first start that brought it on."""
    productive = of_run(names.GOODPUT, select, 'state="productive"')
    return f"{productive} / on (run) sum by (run) ({of_run(names.GOODPUT, select, by='run, state')})"


def recent_goodput(select: str, window: str = "1h") -> str:
    """That of the last hour. What a start finds of the time before it is counted at once, so a rate would miss it."""

    def grown(*more: str) -> str:
        return grown_by(of_run(names.GOODPUT, select, *more, by="run, state"), f"{window}:15s")

    return f"sum by (run) ({grown(_PRODUCTIVE)}) / on (run) (sum by (run) ({grown()}) > 0)"


_PRODUCTIVE = 'state="productive"'


def grown_by(expression: str, window: str) -> str:
    """What a counter of a run has grown by: exactly, and over restarts, which go on from what the start before had counted."""
    return f"({expression}) - min_over_time(({expression})[{window}])"


def restarts(select: str) -> str:
    return or_zero(f"sum by (run) ({of_run(names.RESTARTS, select, by='run, reason')})", select)


def age(metric: Metric, select: str) -> str:
    """Seconds since a time stamp; nothing before the first."""
    return f"time() - ({of_run(metric, select)} > 0)"


def eta(select: str) -> str:
    """Seconds that the steps which are left take at the speed of the last half hour; nothing while it does not step. Of a
    younger run deriv takes what there is, where a rate would divide by the half hour."""
    left = f"({of_run(names.PLANNED_STEPS, select)} - on (run) {of_run(names.STEP, select)})"
    return f"{left} / on (run) (deriv(({of_run(names.STEPS, select)})[30m:30s]) > 0)"


def rank_hours(select: str) -> str:
    """Hours of the run's ranks, at their present number."""
    seconds = f"sum by (run) ({of_run(names.GOODPUT, select, by='run, state')})"
    return f"{seconds} / 3600 * on (run) {of_run(names.WORLD_SIZE, select)}"


def info(select: str) -> str:
    return series(names.JOB, select, 'rank="0"', part="info")


def alerts(select: str) -> str:
    """How many fire for the run."""
    return or_zero(f'count by (run) (ALERTS{{alertstate="firing", {select}}})', select)
