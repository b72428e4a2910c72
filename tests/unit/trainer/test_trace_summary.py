"""What a trace says: idle time, exposed communication, costs by operation."""

import random
from collections.abc import Sequence

import pytest

from trainer.trace_summary import Interval, Span, length, page, summarise, union, without


def points(intervals: Sequence[Interval]) -> set[int]:
    return {x for begin, end in intervals for x in range(int(begin), int(end))}


def test_sets_of_intervals_are_those_of_their_points() -> None:
    draw = random.Random(0)
    for _ in range(200):
        these, those = ([(a := draw.randrange(50), a + draw.randrange(1, 10)) for _ in range(draw.randrange(8))]
                        for _ in range(2))  # fmt: skip
        assert points(union(these)) == points(these)
        assert length(union(these)) == len(points(these))
        assert all(a[1] < b[0] for a, b in zip(union(these), union(these)[1:], strict=False))
        assert points(without(these, those)) == points(these) - points(those)
        assert length(without(these, those)) == len(points(these) - points(those))


def host(name: str, begin: float, end: float, own: float | None = None) -> Span:
    return Span(name, begin, end, "host", own=end - begin if own is None else own)


def test_on_a_cpu_what_no_operation_covers_is_idle_and_communication_alone_is_exposed() -> None:
    spans = [
        Span("forward", 0, 6000, "stage"), Span("data", 6000, 10_000, "stage"), Span("forward", 10_000, 20_000, "stage"),
        host("linear", 0, 4000, own=1000), host("addmm", 1000, 4000), host("linear", 12_000, 16_000),
        host("addmm", 30_000, 31_000),  # after the window
        Span("gloo:all_reduce", 3000, 7000, "communication"), Span("gloo:all_reduce", 15_000, 18_000, "communication"),
        Span("aten::_local_scalar_dense", 13_000, 13_001, "wait"),
    ]  # fmt: skip
    found = summarise(spans, (0, 20_000), num_steps=2)
    assert found.step_ms == 10
    assert found.idle == pytest.approx(1 - 8000 / 20_000)
    assert found.communication_ms == pytest.approx(7.0 / 2)
    assert found.exposed_ms == pytest.approx((3.0 + 2.0) / 2)
    assert (found.kernels, found.waits) == (0, 0.5)
    assert found.stages_ms == {"forward": 8.0, "data": 2.0}
    assert [(o.name, o.calls, o.ms) for o in found.operations] == [
        ("gloo:all_reduce", 1, 3.5), ("linear", 1, 2.5), ("addmm", 0.5, 1.5),
    ]  # fmt: skip
    assert found.gaps == [(8.0, "linear", "linear")]
    text = page(found, "Steps 3 to 4", "a CPU", "trace.json.gz")
    assert "| idle, communication that nothing hides included | 60.0% |" in text
    assert "| of it exposed: nothing is computed beside it | 2.50 ms (25.0%) |" in text
    assert "| `linear` | 1 | 2.50 | 25.0% |" in text


def test_on_a_gpu_its_kernels_are_what_is_computed() -> None:
    spans = [
        Span("forward", 0, 1000, "stage"), host("aten::mm", 0, 900),
        Span("gemm", 500, 700, "device", own=200), Span("copy", 700, 800, "device", own=100),
        Span("ncclDevKernel_AllReduce", 600, 950, "communication"), Span("cudaStreamSynchronize", 900, 990, "wait"),
    ]  # fmt: skip
    found = summarise(spans, (0, 1000), num_steps=1)
    assert found.idle == pytest.approx(0.7)
    assert found.exposed_ms == pytest.approx(0.15)
    assert (found.kernels, found.waits) == (2, 1)
    assert [o.name for o in found.operations] == ["ncclDevKernel_AllReduce", "gemm", "copy"]
    assert "2 kernels; the host waits for the GPU 1 times" in page(found, "Step 1", "a GPU", "trace.json.gz")
