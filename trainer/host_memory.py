"""The C library's allocator on a CPU: what one step frees, the next one gets without asking the kernel.

Left alone, glibc gives memory back whenever a few tens of megabytes at the end of its heap are free, which in training is
at every step, and the kernel clears each page anew when the next step first writes to it. docs/benchmarks.md has what that
costs.
"""

import ctypes

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 1 << 30
"""Free memory that is kept; larger tensors still come from the kernel and go back to it."""
OLD_MMAP_LIMIT = 32 << 20
"""The most that glibc takes before version 2.35."""


def keep_freed_memory() -> bool:
    """For this process and from now on; false where the C library does not know these settings."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    from_heap = mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, OLD_MMAP_LIMIT)
    return bool(from_heap and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
