"""What a process frees, it keeps for the next time."""

import resource
import subprocess
import sys

import pytest

from trainer.config import CODE_ROOT

FAULTS = """
import ctypes, os, resource
import torch
from trainer.host_memory import keep_freed_memory
PR_SET_THP_DISABLE = 41
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0  # pages of one size, however the kernel is set
def step():
    kept = [torch.ones(1 << 20) for _ in range(20)]  # 80 MiB in parts of 4
    large = torch.ones(30 << 20)  # 120 MiB, more than the allocator keeps by itself
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def show():
    for _ in range(10):  # by then each has found its place in the heap: the large one may come to a new one in the fourth
        step()
    begun = faults()
    for _ in range(5):
        step()
    print(faults() - begun, flush=True)
child = os.fork()
if child == 0:
    show()
    os._exit(0)
os.waitpid(child, 0)
assert keep_freed_memory()
show()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_step_asks_the_kernel_for_no_page_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=CODE_ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    left_alone, kept = (int(line) for line in done.stdout.split())
    assert left_alone > 5 * (120 << 20) // resource.getpagesize() * 0.9, "each step's 120 MiB anew"
    assert kept < left_alone / 50
