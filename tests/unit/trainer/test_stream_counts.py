"""What data workers count reaches the metrics, and what they came upon the checkpoint."""

import json

from data.batches import LeftOut
from data.counts import Counts
from data.plan import SampleRef
from trainer import metric_names
from trainer.exporter import Exporter
from trainer.progress import Progress


def test_counts_of_workers_are_added_and_gauges_set() -> None:
    counts, exporter = Counts(), Exporter()
    for seconds in (1.5, 2.0):
        counts.add(metric_names.FETCH_SECONDS, seconds)
        counts.add(metric_names.FETCH_ERRORS, 1, "timeout")
        counts.set(metric_names.CACHE_BYTES, seconds * 100)
    exporter.add(counts.take())
    counts.add(metric_names.FETCH_SECONDS, 0.5)
    exporter.add(counts.take())
    assert counts.take() == {}
    value = exporter.registry.get_sample_value
    assert value("loupe_data_fetch_seconds_total") == 4.0
    assert value("loupe_data_fetch_errors_total", {"error": "timeout"}) == 2
    assert value("loupe_data_cache_bytes") == 200


def test_bad_shards_are_saved_and_older_checkpoints_have_none() -> None:
    progress = Progress(step=3, bad_shards={("photos", 7): LeftOut("missing_shard", since=2)})
    progress.substitutions[SampleRef("photos", 1)] = SampleRef("photos", 2)
    tree = json.loads(json.dumps(progress.to_json()))
    assert Progress.from_json(tree) == progress
    tree["bad_shards"] = [["photos", 7, "missing_shard"]]
    assert Progress.from_json(tree).bad_shards == {("photos", 7): LeftOut("missing_shard", since=0)}
    del tree["bad_shards"]
    assert Progress.from_json(tree).bad_shards == {}
