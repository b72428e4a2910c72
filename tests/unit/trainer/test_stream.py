"""What the datasets must give the plan, said before the first step."""

from pathlib import Path
from typing import Any

import pytest

from data.reader import Dataset, open_dataset
from data.schema import DATASET
from tests.bucketed import picture, row, write_dataset
from tests.tiny import DEMO_SIZES, tiny
from trainer.config import RunConfig, check_shape, size_multiple
from trainer.errors import UserError
from trainer.stream import plan_stream

EMOJI = "data/assets/emoji_64"


class AnyTask:
    """Takes whatever its config takes."""

    def check_side(self, phase: Any, side_px: int) -> None:
        self.smallest = min(side_px, getattr(self, "smallest", side_px))


@pytest.fixture
def url(tmp_path: Path) -> str:
    images = {
        "1:1": [row(f"s{i}", picture(i, 40, 40), label=i % 2) for i in range(9)],
        "2:1": [row(f"w{i}", picture(i, 28, 56), label=-1 if i else 1) for i in range(3)],
    }
    return write_dataset(tmp_path / "set", images)


def opened(config: RunConfig, **urls: str) -> dict[str, Dataset]:
    return {name: open_dataset(url, name=name) for name, url in urls.items()}


def planned(config: RunConfig, datasets: dict[str, Dataset]) -> Any:
    return plan_stream(config, datasets, AnyTask())  # type: ignore[arg-type]


def config(url: str, *overrides: str, name: str = "x", **fields: str) -> RunConfig:
    of_set = "".join(f", {field}: {value}" for field, value in fields.items())
    return tiny(f"data.datasets={{{name}: {{url: {url}{of_set}}}}}", *DEMO_SIZES, *overrides)


def test_buckets_give_shapes_and_a_warning_of_those_that_are_small(url: str) -> None:
    run = config(url, "data.buckets=true")
    planner, warnings = planned(run, opened(run, x=url))
    assert planner.shapes(64) == {"1:1": (64, 64), "2:1": (40, 88)}
    assert warnings == ["data.buckets: bucket 2:1 has fewer images (3) than a batch (8): its batches repeat some"]
    shapes = {planner.shape(planner.plan(step)) for step in range(8)}
    assert shapes == {(32, 32), (24, 40)}
    plain, none = planned(config(url), opened(run, x=url))
    assert none == []
    assert plain.shape(plain.plan(0)) is None
    assert plain.shapes(64) == {}


def test_a_dataset_without_buckets_is_refused() -> None:
    run = config(EMOJI, "data.buckets=true")
    with pytest.raises(UserError, match=r"^data.buckets: dataset x at \S+ has no aspect buckets; build [^\n]*=false$"):
        planned(run, opened(run, x=EMOJI))


def test_one_name_means_one_aspect(url: str, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", {"2:1": [row("w", picture(0, 28, 56))]})
    file = Path(other) / DATASET
    file.write_text(file.read_text().replace('"aspect":2.0', '"aspect":1.9'))
    run = tiny(f"data.datasets={{x: {{url: {url}}}, y: {{url: {other}}}}}", "data.buckets=true")
    with pytest.raises(UserError, match=r"2:1 has the aspect 1.9 in dataset y and 2 in x"):
        planned(run, opened(run, x=url, y=other))


def test_captions_of_none_of_the_kinds_are_refused(url: str) -> None:
    run = config(url, "data.caption_weights={short: 1, detailed: 2}")
    with pytest.raises(UserError, match=r"^data.caption_weights: dataset x has .* short, detailed; it has original$"):
        planned(run, opened(run, x=url))
    some = config(url, "data.caption_weights={short: 1, original: 2}")
    planned(some, opened(some, x=url))


def test_classes_need_labels(url: str) -> None:
    run = config(EMOJI, class_balanced="true")
    with pytest.raises(UserError, match=r"^data.datasets.x.class_balanced: \S+ has no file of labels; build it again"):
        planned(run, opened(run, x=EMOJI))
    run = config(url, class_balanced="true")
    planner, warnings = planned(run, opened(run, x=url))
    assert warnings == ["data.datasets.x.class_balanced: 2 samples without a label are never drawn"]
    dataset = opened(run, x=url)["x"]
    labels = [dataset.read(ref.index).label for ref in planner.refs(0, 60)]
    assert labels.count(0) == labels.count(1) == 30


def test_a_bucket_that_does_not_fit_is_named(url: str) -> None:
    run = config(url, "data.buckets=true", "task.model.position_grid=10")
    with pytest.raises(
        UserError, match=r"^data.buckets: images of bucket 2:1 are 88 x 40 px. task.model.position_grid: 10 "
    ):
        planned(run, opened(run, x=url))
    assert size_multiple(run.task) == 8
    check_shape(run, 1, "4:3", (56, 72))
    with pytest.raises(
        UserError, match=r"^data.buckets: images of bucket 4:3 are 70 x 56 px. phases.1.resolution: 70 px is no"
    ):
        check_shape(run, 1, "4:3", (56, 70))


def test_the_task_is_asked_about_the_shorter_side(url: str) -> None:
    run = config(url, "data.buckets=true")
    task = AnyTask()
    plan_stream(run, opened(run, x=url), task)  # type: ignore[arg-type]
    assert task.smallest == 24

    class Refusing:
        def check_side(self, phase: Any, side_px: int) -> None:
            if side_px < 30:
                raise UserError("too small")

    with pytest.raises(UserError, match=r"^data.buckets: images of bucket 2:1 are 40 x 24 px. too small$"):
        plan_stream(run, opened(run, x=url), Refusing())  # type: ignore[arg-type]


def test_what_turns_squares_alone_is_refused_with_buckets(url: str) -> None:
    with pytest.raises(UserError, match=r"task\.perceptual\.augment: turns square latents alone"):
        config(url, "data.buckets=true", "task.perceptual={kind: latent_lpips, url: x, augment: true}")
    config(url, "data.buckets=true", "task.perceptual={kind: latent_lpips, url: x, augment: false}")
