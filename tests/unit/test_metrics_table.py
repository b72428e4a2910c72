"""docs/operations.md tells of every metric what its definition says."""

from ops.metrics_table import DOCUMENT, with_table
from trainer import metric_names


def test_the_table_in_the_docs_is_of_today() -> None:
    text = DOCUMENT.read_text()
    assert with_table(text) == text, "python -m ops.metrics_table"
    for metric in metric_names.ALL:
        assert f"| `{metric.name}" in text
