"""Losses computed chunk by chunk, with their gradient injected, against the plain graph."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.live_tensors import LiveTensors
from trainer.losses.injection import injected

SIZE, CHANNELS = 7, 4
WEIGHT = 0.1 * torch.randn(32, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(3))


def make(dtype: torch.dtype = torch.float32, size: int = SIZE) -> tuple[Tensor, Tensor]:
    z0_hat, z0 = torch.randn(2, size, CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    return z0_hat, z0


class Distance:
    """Of a network's two maps; records what it was asked for."""

    def __init__(self, z0: Tensor) -> None:
        self.z0 = z0
        self.chunks: list[list[int]] = []

    def features(self, z: Tensor) -> list[Tensor]:
        h = F.silu(F.conv2d(z, WEIGHT.to(z.dtype), padding=1))
        return [h, F.conv_transpose2d(h, WEIGHT.to(z.dtype), padding=1).sin()]

    def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.chunks.append(rows.tolist())
        with torch.no_grad():
            targets = self.features(self.z0[rows])
        each = [(f - g).square().mean((1, 2, 3)) for f, g in zip(self.features(z), targets, strict=True)]
        return each[0] + each[1], {"first": each[0], "second": each[1]}


def run(z0_hat: Tensor, value: Distance, rows: list[int], chunk_size: int = 2, weight_N: Tensor | None = None):
    return injected(
        z0_hat, torch.tensor(rows, dtype=torch.long), value, term_names=("first", "second"), chunk_size=chunk_size,
        weight_N=weight_N,
    )  # fmt: skip


def plain(z0_hat: Tensor, value: Distance, rows: list[int], weight_N: Tensor | None = None) -> Tensor:
    loss_N, _ = value(z0_hat[rows], torch.tensor(rows))
    return loss_N if weight_N is None else loss_N * weight_N


ROWS = [[0, 2, 3, 5, 6], [6, 1], [4], list(range(SIZE))]


@pytest.mark.parametrize(("rows", "chunk_size"), itertools.product(ROWS, [1, 2, 3, 100]), ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-13)], ids=str)
def test_value_and_gradient_are_the_plain_graph_s(
    rows: list[int], chunk_size: int, weighted: bool, dtype: torch.dtype, bound: float
) -> None:
    """Also through what comes before, with a factor of each sample's own after it, and two micro-batches' gradients added."""
    z, z0 = make(dtype)
    weight_N = torch.linspace(0.5, 3.0, len(rows), dtype=torch.float64).to(dtype) if weighted else None
    factor_B = torch.linspace(-1.0, 7.0, SIZE, dtype=dtype)
    before = torch.full((CHANNELS, 1, 1), 0.7, dtype=dtype)
    leaves = [before.clone().requires_grad_() for _ in range(2)]

    loss_B, terms = run(z * leaves[0], Distance(z0), rows, chunk_size, weight_N)
    want_N = plain(z * leaves[1], Distance(z0), rows, weight_N)
    outside = [i for i in range(SIZE) if i not in rows]
    assert (loss_B.dtype, loss_B.shape) == (dtype, (SIZE,))
    torch.testing.assert_close(loss_B[rows], want_N, rtol=bound, atol=0.0)
    torch.testing.assert_close(terms["first"] + terms["second"], loss_B.detach(), rtol=1e-6, atol=0.0)
    for values in (loss_B, *terms.values()):
        assert values[outside].tolist() == [0.0] * len(outside)
    assert not any(term.requires_grad for term in terms.values())

    for scale in (1.0, 1024.0):  # of the loss, as accumulated
        (scale * (loss_B * factor_B).sum()).backward(retain_graph=True)
        (scale * (want_N * factor_B[rows]).sum()).backward(retain_graph=True)
    found, want = (leaf.grad for leaf in leaves)
    assert found is not None
    assert want is not None
    assert (found - want).norm() / want.norm() < bound


def test_chunks_are_even_and_cover_the_rows_once() -> None:
    z, z0 = make()
    value = Distance(z0)
    run(z, value, [5, 0, 1, 6, 3], chunk_size=2)
    assert value.chunks == [[5, 0], [1, 6], [3]]
    value.chunks.clear()
    run(z, value, [0, 1, 2, 3, 4], chunk_size=4)
    assert value.chunks == [[0, 1, 2], [3, 4]]


def test_no_rows_is_zero_with_a_graph_and_runs_nothing() -> None:
    z, z0 = make()
    value, leaf = Distance(z0), torch.ones((), requires_grad=True)
    loss_B, terms = run(z * leaf, value, [])
    assert value.chunks == []
    assert loss_B.tolist() == terms["first"].tolist() == terms["second"].tolist() == [0.0] * SIZE
    loss_B.sum().backward()
    assert leaf.grad == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_outside_the_rows_reaches_nothing(bad: float) -> None:
    z, z0 = make()
    z[2] = bad
    z0[4] = bad
    z.requires_grad_()
    loss_B, _ = run(z, Distance(z0), [0, 1, 3, 6])
    loss_B.mean().backward()
    assert loss_B.isfinite().all()
    assert z.grad is not None
    assert z.grad.isfinite().all()
    assert (z.grad.flatten(1).norm(dim=1) > 0).tolist() == [True, True, False, True, False, False, True]


def test_what_is_not_finite_inside_is_its_sample_s_alone() -> None:
    z, z0 = make()
    z[1] = float("nan")
    z.requires_grad_()
    loss_B, terms = run(z, Distance(z0), [0, 1, 3], chunk_size=3)
    loss_B.mean().backward()
    assert loss_B.isfinite().tolist() == terms["first"].isfinite().tolist() == [True, False, *[True] * 5]
    assert z.grad is not None
    assert z.grad.flatten(1).isfinite().all(1).tolist() == [True, False, *[True] * 5]


def test_under_autocast_it_is_the_plain_graph_under_autocast() -> None:
    z, z0 = make()
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    rows = [0, 2, 5]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_B, _ = run(leaves[0], Distance(z0), rows)
        want_N = plain(leaves[1], Distance(z0), rows).float()
    assert loss_B.dtype == torch.float32
    exact_N = plain(z, Distance(z0), rows)
    assert not torch.allclose(want_N, exact_N, rtol=1e-4), "autocast was at work"
    torch.testing.assert_close(loss_B[rows], want_N, rtol=1e-2, atol=0.0)
    loss_B.sum().backward()
    want_N.sum().backward()
    found, want = (leaf.grad for leaf in leaves)
    assert found is not None
    assert want is not None
    assert (found - want).norm() / want.norm() < 1e-2


def test_without_gradient_nothing_is_differentiated() -> None:
    z, z0 = make()
    z.requires_grad_()
    graphs = []

    class Watched(Distance):
        def __call__(self, z: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            graphs.append(z.requires_grad or torch.is_grad_enabled())
            return super().__call__(z, rows)

    with torch.no_grad():
        quiet_B, _ = run(z, Watched(z0), [0, 1, 2])
    loss_B, _ = run(z, Watched(z0), [0, 1, 2])
    assert graphs == [False, False, True, True]
    assert not quiet_B.requires_grad
    assert torch.equal(quiet_B, loss_B.detach())


def test_a_second_derivative_is_refused() -> None:
    z, z0 = make()
    z.requires_grad_()
    loss_B, _ = run(z, Distance(z0), [0])
    (gradient,) = torch.autograd.grad(loss_B.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_memory_is_one_chunk_s_whatever_the_batch() -> None:
    """The most that is alive beyond the latents, in a batch of 4 and of 16, and what the graph keeps afterwards."""

    def step(size: int, chunk_size: int | None) -> tuple[int, int]:
        z, z0 = make(size=size)
        z.requires_grad_()
        with LiveTensors() as live:
            rows = list(range(size))
            loss_B = plain(z, Distance(z0), rows) if chunk_size is None else run(z, Distance(z0), rows, chunk_size)[0]
            kept = live.bytes
            loss_B.sum().backward()
        return live.peak_bytes, kept

    latents = 4 * CHANNELS * 8 * 8  # bytes a sample
    (small, small_kept), (large, large_kept) = step(4, 2), step(16, 2)
    assert large - small < 6 * 12 * latents
    assert small_kept < 4 * latents + 1000
    assert large_kept < 16 * latents + 2000
    plain_small, plain_large = step(4, None)[0], step(16, None)[0]
    assert plain_large > 3.5 * plain_small
    assert large < 0.4 * plain_large
