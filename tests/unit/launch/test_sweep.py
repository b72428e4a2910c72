"""Arrays of runs: which values, which folders."""

import pytest

from launch.job import JobSpec
from launch.slurm_job.sweep import elements, spec_of_element, values_of
from trainer.errors import UserError


def test_all_combinations_each_with_a_name_of_its_own() -> None:
    found = elements(["phases.0.learning_rate=1e-4,3e-4"], 2)
    assert [(e.label, e.overrides) for e in found] == [
        ("learning_rate-1e-4-seed-0", ("phases.0.learning_rate=1e-4", "seed=0")),
        ("learning_rate-1e-4-seed-1", ("phases.0.learning_rate=1e-4", "seed=1")),
        ("learning_rate-3e-4-seed-0", ("phases.0.learning_rate=3e-4", "seed=0")),
        ("learning_rate-3e-4-seed-1", ("phases.0.learning_rate=3e-4", "seed=1")),
    ]


def test_values_may_have_commas_within_brackets() -> None:
    assert values_of("x", "[1,2],{a: 1, b: 2}, null") == ["[1,2]", "{a: 1, b: 2}", "null"]
    assert values_of("x", "9-11") == ["9", "10", "11"]
    assert values_of("x", "1-a") == ["1-a"]


def test_names_that_would_be_one_folder_become_numbers() -> None:
    assert [e.label for e in elements(["url=s3://a/b,s3:/a/b"], None)] == ["000", "001"]
    label = elements(["url=../../etc"], None)[0].label
    assert "/" not in label
    assert not label.startswith(".")


@pytest.mark.parametrize(
    ("sweeps", "seeds", "said"),
    [
        (["seed"], None, "--array seed: write it as"),
        (["seed="], None, "empty or there twice"),
        (["seed=1,1"], None, "empty or there twice"),
        (["seed=7-0"], None, "from the smaller number to the larger"),
        (["seed=0-100000"], None, "at most 1000"),
        (["seed=1,2"], 2, "given twice; --seeds is"),
        (["a=0-99", "b=0-99"], None, "10000 runs; at most 1000"),
        (["$(x)=1"], None, "write it as"),
    ],
)
def test_what_is_no_array(sweeps: list[str], seeds: int | None, said: str) -> None:
    with pytest.raises(UserError) as e:
        elements(sweeps, seeds)
    assert said in str(e.value)


def test_each_run_has_its_folder_and_its_code() -> None:
    element = elements(["seed=3"], None)[0]
    own = spec_of_element(JobSpec("demo", "/runs/r", "slurm", code_dir="/runs/r/code"), element)
    assert (own.run_dir, own.code_dir, own.work_dir) == ("/runs/r-seed-3", "/runs/r-seed-3/code", "/runs/r-seed-3")
    far = spec_of_element(JobSpec("demo", "s3://b/r", "slurm", code_dir="/shared/code"), element)
    assert (far.run_dir, far.code_dir) == ("s3://b/r-seed-3", "/shared/code-seed-3")
