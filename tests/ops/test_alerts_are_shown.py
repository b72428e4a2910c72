"""Which alerts the tests of this folder make fire by their real cause, and why the others are not."""

import re
from pathlib import Path

from ops.prometheus.render import all_rules, each_rule

BY_PROMTOOL_ALONE = {
    "LoupeLowGoodput": "two hours of a run that trains little: two minutes, shortened, in which it restarts all the time",
    "LoupeBadSamples": "a data set with damaged samples, at one of a thousand",
    "LoupeBadShards": "a data set with a damaged shard",
    "LoupeSinkFailing": "a full disk or a server that is gone in the middle of a run",
}
"""ops/prometheus/tests has all alerts; these have no test with a real cause."""


def test_every_alert_is_shown_or_named_here() -> None:
    alerts = {rule["alert"] for rule in each_rule(all_rules()) if "alert" in rule}
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*alerts.py")]
    shown = {name for text in texts for call in re.findall(r"await_alerts\(([^)]*)\)", text)
             for name in re.findall(r'"(\w+)"', call)}  # fmt: skip
    assert shown | set(BY_PROMTOOL_ALONE) == alerts
    assert not shown & set(BY_PROMTOOL_ALONE)
