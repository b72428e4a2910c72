"""What a process frees, it keeps for the next time."""

import resource
import subprocess
import sys

import pytest

from trainer.config import CODE_ROOT

FAULTS = """
import ctypes, resource, sys
import torch
from trainer.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0  # pages of one size, however the kernel is set
def step():
    kept = [torch.ones(1 << 20) for _ in range(20)]  # 80 MiB in parts of 4
    large = torch.ones(30 << 20)  # 120 MiB, more than the allocator keeps by itself
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
begun = faults()
for _ in range(5):
    step()
print(faults() - begun)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how], cwd=CODE_ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_asks_the_kernel_for_no_page_again() -> None:
    left_alone, kept = faults("leave"), faults("keep")
    assert left_alone > 5 * (120 << 20) // resource.getpagesize() * 0.9, "each step's 120 MiB anew"
    assert kept < left_alone / 50
