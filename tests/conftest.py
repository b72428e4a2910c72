"""What all tests share: the folder beside the checkout, and what happens where a thing they need is missing."""

import os
import shutil
from collections.abc import Generator
from pathlib import Path

import pytest

from tests import slurm_cluster
from trainer.garbage import without_collection

SHARED = Path(__file__).parents[2] / "shared"
_OPS_PROGRAMS = ("prometheus", "promtool", "prometheus-alertmanager", "amtool", "chromium")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """`../shared`: real photos and small real networks that the product does not ship."""
    return SHARED


def pytest_configure(config: pytest.Config) -> None:
    """Without the GPU's own tests, tests are the CPU's: the same on every machine."""
    if "not gpu" in config.getoption("-m") or config.getoption("-m") == "long":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported while tests are looked for is half a million objects that stay: nothing looks at them again."""
    with without_collection():
        return (yield)


def _missing(item: pytest.Item) -> str | None:
    if item.get_closest_marker("shared") and not (SHARED / "data").is_dir():
        return "../shared is not beside the checkout"
    if item.get_closest_marker("slurm") and not slurm_cluster.installed():
        return "SLURM's daemons are not installed, or this is not root; .ci/install-services.sh installs them"
    missing = (
        [program for program in _OPS_PROGRAMS if not shutil.which(program)] if item.get_closest_marker("ops") else []
    )
    if missing:
        return f"{', '.join(missing)} not installed; .ci/install-services.sh installs them"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here. In CI everything must run, so there a skip is a failure. A GPU's tests are asked for by
    name, so where there is none that is a mistake, not something to skip."""
    if item.get_closest_marker("gpu"):
        import torch  # here, so that tests of what imports no torch start without it

        if not torch.cuda.is_available():
            pytest.fail("a GPU's test was selected, and this machine shows no CUDA device", pytrace=False)
    reason = _missing(item)
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"CI must not skip: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def alone():  # type: ignore[no-untyped-def]
    """This process as a job of one rank."""
    import torch.distributed as dist

    from trainer.parallel.world import init_world

    yield init_world(num_threads=1)
    dist.destroy_process_group()
