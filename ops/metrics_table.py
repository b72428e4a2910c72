"""The table of all metrics in docs/operations.md, from their definitions.

python -m ops.metrics_table      writes it anew; a test holds both equal
"""

from pathlib import Path

from trainer import metric_names

DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"
BEGIN, END = "<!-- python -m ops.metrics_table -->\n", "<!-- end of the table -->\n"


def table() -> str:
    lines = ["| metric | type | labels | of | what |", "|---|---|---|---|---|"]
    for metric in sorted(metric_names.ALL, key=lambda metric: metric.name):
        name = metric.name + ("_info" if metric.kind == "info" else "")
        of = "every rank" if metric in metric_names.OF_EVERY_RANK else "rank 0"
        if metric.name.startswith("loupe_data_stage_"):
            of = "data stages"
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{name}` | {metric.kind} | {labels} | {of} | {metric.help.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def with_table(text: str) -> str:
    before, found, rest = text.partition(BEGIN)
    assert found, f"{DOCUMENT.name} has no {BEGIN.strip()}"
    return before + BEGIN + table() + END + rest.partition(END)[2]


if __name__ == "__main__":
    DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
