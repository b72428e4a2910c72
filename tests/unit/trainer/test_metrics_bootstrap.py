"""Intervals: against scipy's bootstrap, closed forms, and how often they hold the truth. What features have to be."""

import numpy as np
import pytest
import scipy.stats

from trainer.errors import UserError
from trainer.evaluate.metrics.bootstrap import Estimate, bootstrap, bootstrap_difference, mean
from trainer.evaluate.metrics.checks import check_features
from trainer.evaluate.metrics.clip_score import clip_score


def test_interval_of_a_mean_is_scipys() -> None:
    rows = np.random.default_rng(0).exponential(size=200)
    found = bootstrap(mean, rows, resamples=4000, confidence=0.9)
    reference = scipy.stats.bootstrap(
        (rows,), np.mean, n_resamples=4000, confidence_level=0.9, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(rows.mean())
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.05 * width)
    assert found.high == pytest.approx(reference.high, abs=0.05 * width)
    assert bootstrap(mean, rows, resamples=50) == bootstrap(mean, rows, resamples=50)
    assert bootstrap(mean, rows, resamples=50) != bootstrap(mean, rows, resamples=50, seed=1)
    wide, narrow = bootstrap(mean, rows, confidence=0.99), bootstrap(mean, rows, confidence=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    found = [bootstrap(mean, rng.normal(3, 1, 60), resamples=200, confidence=0.9, seed=i) for i in range(300)]
    # 90 % give or take 1.7 %; percentiles of 60 rows are a little narrow
    assert 0.83 <= np.mean([e.low <= 3 <= e.high for e in found]) <= 0.95


def test_pairs_are_drawn_together() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(size=(40, 8))
    text = image * rng.uniform(1, 2, size=(40, 1))
    assert bootstrap(clip_score, image, text, resamples=50) == Estimate(2.5, pytest.approx(2.5), pytest.approx(2.5))  # type: ignore[arg-type]
    apart = bootstrap(clip_score, image, text, resamples=50, paired=False)
    assert apart.low < 1


def test_unpaired_sets_may_differ_in_length() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 4000), rng.normal(0, 2, 1000)
    found = bootstrap(lambda x, y: mean(x) - mean(y), a, b, paired=False, resamples=500)
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx(
        np.hypot(1 / np.sqrt(4000), 2 / np.sqrt(1000)), rel=0.15
    )


def test_difference_of_two_models_on_the_same_prompts() -> None:
    """What prompts have in common cancels: the difference is known far better than either score."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 10, 300)
    a, b = prompts + rng.normal(0.5, 1, 300), prompts + rng.normal(0, 1, 300)
    found = bootstrap_difference(mean, (a,), (b,))
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert 0 < found.low < found.value < found.high
    assert (found.high - found.low) / 2 / 1.96 == pytest.approx((a - b).std() / np.sqrt(300), rel=0.15)
    of_a = bootstrap(mean, a)
    assert of_a.high - of_a.low > 5 * (found.high - found.low)
    same = bootstrap_difference(mean, (a,), (a,), resamples=20)
    assert same == Estimate(0.0, 0.0, 0.0)


def test_bad_input() -> None:
    rows = np.arange(3.0)
    with pytest.raises(UserError, match=r"\[3, 2\] rows"):
        bootstrap(clip_score, rows, rows[:2])
    with pytest.raises(UserError, match=r"\[0\] rows"):
        bootstrap(mean, rows[:0])
    with pytest.raises(UserError, match="0 resamples"):
        bootstrap(mean, rows, resamples=0)
    for confidence in (0.0, 1.0, 95.0, float("nan")):
        with pytest.raises(UserError, match="confidence: "):
            bootstrap(mean, rows, resamples=2, confidence=confidence)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((4, 0)), r"shape \(4, 0\)"),
        (np.zeros((4, 2, 2)), r"shape \(4, 2, 2\)"),
        (np.zeros((4, 2), dtype=complex), "type complex128"),
        (np.array([["a", "b"]]), "type <U1"),
        (np.zeros((4, 2)), "of 4 images, and this metric needs 5"),
        (np.array([[0, 1], [np.nan, 0], [0, 0], [1, -np.inf], [0, 0]]), "in row 1 and 1 more"),
        (np.array([[np.inf, -np.inf]] * 5), "in row 0 and 4 more"),
    ],
)
def test_features_that_are_none_are_named(features: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=f"my images: .*{message}"):
        check_features("my images", features, at_least=5 if len(features) > 1 else 1)


def test_large_features_are_not_taken_for_infinite_ones() -> None:
    check_features("x", np.full((3, 50), 3e38, dtype=np.float32))
    check_features("x", np.full((3, 4000), 60000, dtype=np.float16))
    check_features("x", np.full((3, 2), 2, dtype=np.uint8))
