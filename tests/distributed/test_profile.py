"""A trace of a run's steps: written by the ranks that are named, while the others wait, and without a trace in the numbers."""

import gzip
import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.test_training import losses, several
from tests.tiny import tiny
from trainer.config import check_layout, config_digest, replace
from trainer.config_text import with_overrides
from trainer.errors import ExitCode, UserError
from trainer.run_folder import RunFolder
from trainer.trace_summary import SHOWN

PROFILE = "profile={after_steps: 3, num_steps: 2, ranks: [1]}"
NEVER = "profile={after_steps: 30}"


def test_the_named_rank_writes_what_its_steps_did_and_losses_stay(tmp_path: Path) -> None:
    config = tiny("data.num_workers=0")
    config = replace(config, phases=config.phases[:1])
    plain, traced, short = (with_overrides(config, extra) for extra in ((), (PROFILE,), (NEVER,)))
    urls = [str(tmp_path / name) for name in ("plain", "traced", "short")]
    jobs = [(config, url, "") for config, url in zip((plain, traced, short), urls, strict=True)]
    assert run_ranks(2, several, jobs)[0] == [ExitCode.DONE] * 3
    assert losses(urls[1]) == losses(urls[0])

    folder = RunFolder(urls[1])
    assert set(folder.names("profile")) == {"step-00000005-rank-1.md", "step-00000005-rank-1.json.gz"}
    trace = json.loads(gzip.decompress((tmp_path / "traced/profile/step-00000005-rank-1.json.gz").read_bytes()))
    names = [event.get("name", "") for event in trace["traceEvents"]]
    # forward and backward of two steps, named as in the metrics
    assert names.count("stage:forward") >= 2
    assert names.count("stage:backward") >= 2
    assert any(name.startswith("gloo:") for name in names)
    page = folder.read_text("profile/step-00000005-rank-1.md")
    assert page.startswith("# 2 steps up to step 5, rank 1 of 2\n")
    for line in ("| communication |", "| forward |", "| operation | calls a step |"):
        assert line in page
    assert page.count("\n| `") == SHOWN
    assert "aten::addmm" in names
    assert (
        '"note": "profile: none, as this start took 8 steps and its window ends after 35'
        in (tmp_path / "short/metrics/0000.jsonl").read_text()
    )


def test_a_run_that_goes_on_may_be_traced_and_ranks_must_be_there() -> None:
    assert config_digest(tiny(PROFILE)) == config_digest(tiny())
    with pytest.raises(UserError, match=r"profile.ranks: 1, and there are ranks 0 to 0"):
        check_layout(tiny(PROFILE), 1)
