"""Several runs on one page: figures in a table, curves over each other, where configs differ. No torch."""

from collections.abc import Sequence

from launch.report import sections
from launch.report.charts import Chart
from launch.report.config_diff import differences
from launch.report.gather import RunReport
from launch.report.html import section, table, text
from launch.report.quality import quality
from launch.report.summary import facts_of, mood


def comparison(runs: Sequence[RunReport], charts: Sequence[Chart]) -> str:
    parts = [
        _summary(runs),
        sections.charts_section("losses", "Losses", charts, tools=sections.SCALE_TOOLS),
        sections.frames(
            "samples", "Samples", [(run.name, run.samples) for run in runs],
            "Of each run the newest pictures at or before the step; prompts and seeds are each run's own.",
        ),
        sections.frames(
            "reconstructions", "Reconstructions", [(run.name, run.reconstructions) for run in runs],
            "Of each run the newest pictures at or before the step.",
        ),
        sections.charts_section("evaluation", "Evaluation", charts),
        quality([(run.name, run.evaluations) for run in runs], lambda i: f'<span class="swatch c{i % 12}"></span>'),
        _goodput(runs),
        sections.charts_section("speed", "Speed", charts),
        sections.charts_section("optimisation", "Optimisation", charts),
        _configs(runs),
    ]  # fmt: skip
    return "\n".join(part for part in parts if part)


def _name(run: RunReport, number: int) -> str:
    return f'<span class="swatch c{number % 12}"></span>{text(run.name, 60)}'


def _summary(runs: Sequence[RunReport]) -> str:
    facts = [facts_of(run) for run in runs]
    state = ["State", *(f'<span class="pill {mood(run)}">{text(run.row.state.word, 40)}</span>' for run in runs)]
    titles = [fact.title.partition(" left")[0] for fact in facts[0]]
    rows = [
        [title, *(f"<b>{text(of_run[i].value)}</b><small>{text(of_run[i].detail)}</small>" for of_run in facts)]
        for i, title in enumerate(titles)
    ]
    head = ["", *(_name(run, i) for i, run in enumerate(runs))]
    lacking = "".join(sections.missing(run, named=True) for run in runs)
    return section(
        "summary", "Summary", table(head, [state, *rows], label="Figures of the runs", class_="facts") + lacking
    )


def _goodput(runs: Sequence[RunReport]) -> str:
    bars = "".join(
        f"<h3>{_name(run, i)}</h3>{sections.goodput_bar(run.row.seconds)}"
        for i, run in enumerate(runs)
        if run.row.seconds
    )
    return section("goodput", "Where the time went", bars) if bars else ""


def _configs(runs: Sequence[RunReport]) -> str:
    known = [(i, run, run.facts.config) for i, run in enumerate(runs) if run.facts.config is not None]
    if len(known) < 2:
        return ""
    found = differences([config for _, _, config in known])
    if not found:
        return section("config", "Config", '<p class="about">The same in all of them, field by field.</p>')
    rows = [(f"<code>{text(d.field)}</code>", *(text(value, 200) for value in d.values)) for d in found]
    head = ["field", *(_name(run, i) for i, run, _ in known)]
    return section("config", "Config differences", table(head, rows, label="Fields in which the configs differ"))
