"""Vector quantisation against diffusers', its gradients by hand, and a codebook's life over steps against a slow reference."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks
from trainer.config import CodebookConfig
from trainer.models.codebook import CHUNK, CodebookState, nearest, quantize

CPU = torch.device("cpu")
BATCH, CHANNELS, SIDE, SIZE = 4, 3, 4, 12
KEPT, REFUSED = torch.ones(()), torch.zeros(())


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents(step: int = 0) -> Tensor:
    """In two clumps, far from some of the codes."""
    z = normal(BATCH, CHANNELS, SIDE, SIDE, seed=step)
    return 0.3 * z + z.sign() * 0.7


def first_codes() -> Tensor:
    return normal(SIZE, CHANNELS, seed=99)


# --------------------------------------------------------------------------------------------------------------- one pass


def test_as_diffusers_quantizes() -> None:
    theirs = VectorQuantizer(SIZE, CHANNELS, beta=0.25, legacy=False)
    codes = theirs.embedding.weight
    with torch.no_grad():
        codes.copy_(first_codes())
    z = latents().requires_grad_()
    z_q, loss, (_, _, indices) = theirs(z)
    ours = quantize(z, codes)
    assert torch.equal(ours.indices_BHW.flatten(), indices)
    assert len(indices.unique()) > 4
    assert torch.equal(ours.latents_BCHW, z_q)
    found = (ours.codebook_B + 0.25 * ours.commitment_B).mean()
    torch.testing.assert_close(found, loss)
    for mine, other in zip(torch.autograd.grad(found, [z, codes]), torch.autograd.grad(loss, [z, codes]), strict=True):
        torch.testing.assert_close(mine, other)


def test_straight_through_is_the_identity() -> None:
    z, codes, gradient = latents().requires_grad_(), first_codes().requires_grad_(), normal(*latents().shape, seed=5)
    out = quantize(z, codes).latents_BCHW
    of_z, of_codes = torch.autograd.grad(out, [z, codes], gradient, allow_unused=True)
    assert torch.equal(of_z, gradient)
    assert of_codes is None


def test_losses_and_gradients_by_hand() -> None:
    """van den Oord et al., eq. 3: a loop over pixels, in float64."""
    z, codes = latents().double().requires_grad_(), first_codes().double().requires_grad_()
    out = quantize(z, codes)
    n = CHANNELS * SIDE * SIDE
    errors_B, of_z, of_codes = torch.zeros(BATCH).double(), torch.zeros_like(z), torch.zeros_like(codes)
    for b, i, j in np.ndindex(BATCH, SIDE, SIDE):
        distances = [sum((z[b, c, i, j] - code[c]) ** 2 for c in range(CHANNELS)).item() for code in codes.detach()]
        k = int(np.argmin(distances))
        assert out.indices_BHW[b, i, j] == k
        difference = (z[b, :, i, j] - codes[k]).detach()
        errors_B[b] += difference.square().sum() / n
        of_z[b, :, i, j] = 2 * difference / n
        of_codes[k] -= 2 * difference / n
    for loss_B in (out.codebook_B, out.commitment_B):
        torch.testing.assert_close(loss_B.detach(), errors_B)
    for loss_B, leaf, other, expected in (
        (out.codebook_B, codes, z, of_codes),
        (out.commitment_B, z, codes, of_z),
    ):
        found, none = torch.autograd.grad(loss_B.sum(), [leaf, other], allow_unused=True, retain_graph=True)
        torch.testing.assert_close(found, expected)
        assert none is None


def test_of_equal_codes_the_first_is_chosen() -> None:
    codes = torch.tensor([[5.0, 5.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert nearest(torch.tensor([[0.9, 0.1], [0.0, 0.3], [-2.0, 0.0]]), codes).tolist() == [1, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_lower_distances(dtype: torch.dtype) -> None:
    """Codes that lie closer than bf16 tells apart."""
    codes = 1.0 + 0.02 * normal(256, CHANNELS, seed=1)
    vectors = (1.0 + 0.02 * normal(500, CHANNELS, seed=2)).to(dtype)
    exact = (vectors.double()[:, None] - codes.double()).square().sum(-1).argmin(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(vectors, codes)
        lowered = (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(1)
    assert (found == exact).float().mean() > 0.99  # float32 rounds too
    assert (lowered == exact).float().mean() < 0.5


def test_memory_of_many_codes_is_bounded() -> None:
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    codes, vectors = normal(16384, 4, seed=0), normal(1500, 4, seed=1)
    assert len(codes) * len(vectors) > CHUNK
    with Sizes():
        indices = nearest(vectors, codes)
    assert max(largest) <= CHUNK
    for row in (0, 1023, 1024, 1499):  # on both sides of where chunks meet
        assert indices[row] == (codes - vectors[row]).square().sum(1).argmin()


# ---------------------------------------------------------------------------------------------------------- running means


def one_step(
    state: CodebookState, codes: Tensor, step: int, z: Tensor, parts: list[list[int]], keep: Tensor = KEPT
) -> Tensor:
    """A step whose images come in `parts`; the codes after it."""
    uniform_2K = torch.from_numpy(np.random.default_rng(step).random((2, state.config.size)))
    for part in parts:
        state.observe(z[part], quantize(z[part], codes).indices_BHW)
        if state.restart_is_due(step):
            state.offer(z[part], np.asarray(part), BATCH, uniform_2K)
    moved = state.end_step(codes if state.moves_codes(step) else None, step, keep)
    assert (moved is not None) == state.moves_codes(step)
    return codes if moved is None else moved


WHOLE = [[0, 1, 2, 3]]


def test_running_means_against_a_slow_reference(alone: Any) -> None:
    """Appendix A of van den Oord et al.; a code that nothing has chosen stays where it is."""
    config = CodebookConfig(size=SIZE, update="ema", ema_decay=0.8)
    state, codes = CodebookState(config, CHANNELS, CPU), first_codes()
    slow = codes.double().numpy().copy()
    number, total = np.zeros(SIZE), np.zeros((SIZE, CHANNELS))
    for step in range(6):
        z = latents(step)
        vectors = z.permute(0, 2, 3, 1).reshape(-1, CHANNELS).double().numpy()
        chosen = np.array([((slow - v) ** 2).sum(1).argmin() for v in vectors])
        for k in range(SIZE):
            number[k] = 0.8 * number[k] + 0.2 * (chosen == k).sum()
            total[k] = 0.8 * total[k] + 0.2 * vectors[chosen == k].sum(0)
            if number[k] > 0:
                slow[k] = total[k] / number[k]
        codes = one_step(state, codes, step, z, WHOLE)
        torch.testing.assert_close(codes.double(), torch.from_numpy(slow), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state.counts_K.double(), torch.from_numpy(number), rtol=1e-5, atol=1e-7)
    unchosen = number == 0
    assert 0 < unchosen.sum() < SIZE
    assert torch.equal(codes[unchosen], first_codes()[unchosen])


def test_a_code_that_is_no_longer_chosen_stays_where_it_is(alone: Any) -> None:
    state = CodebookState(CodebookConfig(size=2, update="ema", ema_decay=0.5), 1, CPU)
    codes = torch.tensor([[-1.0], [1.0]])
    codes = one_step(state, codes, 0, torch.tensor([-2.0, 3.0, 3.5, -2.5]).view(4, 1, 1, 1), WHOLE)
    assert codes.tolist() == [[-2.25], [3.25]]
    for step in range(1, 300):  # until its count is less than the smallest float32
        codes = one_step(state, codes, step, torch.full((4, 1, 1, 1), -2.0), WHOLE)
    assert state.counts_K[1] == 0
    torch.testing.assert_close(codes, torch.tensor([[-2.0], [3.25]]))


def test_codes_that_are_given_are_as_if_chosen_before(alone: Any) -> None:
    """A step moves them by a step's share, and not to the mean of its own few latents."""
    state = CodebookState(CodebookConfig(size=2, update="ema", ema_decay=0.9), 1, CPU)
    codes = torch.tensor([[-1.0], [5.0]])
    state.begin_with(codes, 4.0)
    codes = one_step(state, codes, 0, torch.tensor([-2.0, -3.0, -2.5, -0.5]).view(4, 1, 1, 1), WHOLE)
    torch.testing.assert_close(codes, torch.tensor([[(0.9 * 4 * -1.0 + 0.1 * -8.0) / 4.0], [5.0]]))
    torch.testing.assert_close(state.counts_K, torch.tensor([4.0, 3.6]))
    assert state.terms()["codebook_usage"] == 0.5
    frozen = CodebookState(CodebookConfig(size=2, update="ema"), 1, CPU, frozen=True)
    frozen.begin_with(codes, 4.0)
    assert torch.equal(one_step(frozen, codes, 0, torch.zeros(4, 1, 1, 1), WHOLE), codes)


# ------------------------------------------------------------------------------------------------------------ dead codes

UPDATES = ["gradient", "ema"]
RESTARTING: dict[str, Any] = {"size": SIZE, "ema_decay": 0.8, "restart_below": 2.0, "restart_every_steps": 2}


@pytest.mark.parametrize("update", UPDATES)
def test_dead_codes_begin_again_at_latents_of_the_batch(update: Any, alone: Any) -> None:
    state, codes = CodebookState(CodebookConfig(**RESTARTING, update=update), CHANNELS, CPU), first_codes()
    number = np.zeros(SIZE)
    restarts = 0
    for step in range(4):
        z, before = latents(step), codes
        indices = quantize(z, codes).indices_BHW.flatten().numpy()
        number = 0.8 * number + 0.2 * np.bincount(indices, minlength=SIZE)
        codes = one_step(state, codes, step, z, WHOLE)
        if step % 2 == 0:
            assert update == "ema" or torch.equal(codes, before)
            continue
        u_image, u_pixel = np.random.default_rng(step).random((2, SIZE))
        dead = number < 2.0
        assert 0 < dead.sum() < SIZE
        for k in range(SIZE):
            vectors = z[int(u_image[k] * BATCH)].flatten(1).T  # (pixels, C)
            if dead[k]:
                assert torch.equal(codes[k], vectors[int(u_pixel[k] * SIDE * SIDE)])
            elif update == "gradient":
                assert torch.equal(codes[k], before[k])
        number[dead] = 2.0
        restarts += int(dead.sum())
        torch.testing.assert_close(state.counts_K.double(), torch.from_numpy(number), rtol=1e-5, atol=1e-7)
        if update == "ema":  # its running mean goes on from there
            torch.testing.assert_close(codes, state.sums_KC / state.counts_K[:, None])
    assert state.terms()["codes_restarted"] == restarts


def life(parts: list[list[int]], update: Any, steps: int = 6) -> list[Tensor]:
    """Codes and state after some steps whose images came in these parts."""
    state, codes = CodebookState(CodebookConfig(**RESTARTING, update=update), CHANNELS, CPU), first_codes()
    for step in range(steps):
        codes = one_step(state, codes, step, latents(step), parts)
    return [codes, *(tensor.clone() for tensor in state.state_tensors().values())]


def lives_of_rank(world: Any) -> list[list[Tensor]]:
    mine = [[3], [0]] if world.rank == 0 else [[2, 1]]
    return [life(mine, update) for update in UPDATES]


def assert_same_life(found: list[Tensor], expected: list[Tensor], update: str) -> None:
    for tensor, other in zip(found, expected, strict=True):
        if update == "gradient":  # counts are whole numbers, whatever the order
            assert torch.equal(tensor, other)
        else:
            torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3], [1, 0], [2]], [[2, 0, 3, 1]]], ids=str)
def test_micro_batches_do_not_matter(parts: list[list[int]], update: str, alone: Any) -> None:
    assert_same_life(life(parts, update), life(WHOLE, update), update)


def test_two_ranks_equal_one(alone: Any) -> None:
    first, second = run_ranks(2, lives_of_rank)
    for update, mine, others in zip(UPDATES, first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))
        assert_same_life(mine, life(WHOLE, update), update)


# ------------------------------------------------------------------------------------- refused steps, resuming, frozen ones


@pytest.mark.parametrize("update", UPDATES)
def test_a_refused_step_changes_nothing(update: Any, alone: Any) -> None:
    state, codes = CodebookState(CodebookConfig(**RESTARTING, update=update), CHANNELS, CPU), first_codes()
    for step in range(3):
        codes = one_step(state, codes, step, latents(step), WHOLE)
    before = {name: tensor.clone() for name, tensor in state.state_tensors().items()}
    for z in (latents(3), torch.full_like(latents(3), torch.nan)):
        after = one_step(state, codes, 3, z, WHOLE, REFUSED)
        assert torch.equal(after, codes)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.state_tensors().items())
    codes = one_step(state, codes, 3, latents(3), WHOLE)  # nothing is left of what was seen before
    for step in (4, 5):
        codes = one_step(state, codes, step, latents(step), WHOLE)
    for tensor, other in zip([codes, *state.state_tensors().values()], life(WHOLE, update), strict=True):
        assert torch.equal(tensor, other)


@pytest.mark.parametrize("update", UPDATES)
def test_state_is_all_there_is(update: Any, alone: Any) -> None:
    codes, *tensors = life(WHOLE, update, steps=3)
    state = CodebookState(CodebookConfig(**RESTARTING, update=update), CHANNELS, CPU)
    for target, tensor in zip(state.state_tensors().values(), tensors, strict=True):
        target.copy_(tensor)
    for step in (3, 4, 5):
        codes = one_step(state, codes, step, latents(step), WHOLE)
    for found, expected in zip([codes, *state.state_tensors().values()], life(WHOLE, update), strict=True):
        assert torch.equal(found, expected)


def test_frozen_codes_are_only_counted(alone: Any) -> None:
    state = CodebookState(CodebookConfig(**RESTARTING, update="ema"), CHANNELS, CPU, frozen=True)
    for step in range(4):
        assert not state.moves_codes(step)
        assert torch.equal(one_step(state, first_codes(), step, latents(step), WHOLE), first_codes())
    assert state.terms()["perplexity"] > 2
    assert state.terms()["codes_restarted"] == 0


# ---------------------------------------------------------------------------------------------------------------- metrics


def seen(state: CodebookState, counts: list[int], step: int = 0) -> dict[str, float]:
    indices = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    state.observe(torch.zeros(1, 1, 1, len(indices)), indices.view(1, 1, -1))
    state.end_step(torch.zeros(len(counts), 1) if state.moves_codes(step) else None, step, KEPT)
    return {name: float(term) for name, term in state.terms().items()}


def test_perplexity_and_usage_by_hand(alone: Any) -> None:
    def fresh() -> CodebookState:
        return CodebookState(CodebookConfig(size=4, ema_decay=0.9), 1, CPU)

    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert seen(fresh(), [6, 2, 0, 0]) == pytest.approx(
        {"perplexity": math.exp(entropy), "codebook_usage": 0.5, "codes_restarted": 0}
    )
    for counts, perplexity, usage in (([3, 3, 3, 3], 4.0, 1.0), ([0, 0, 7, 0], 1.0, 0.25)):
        terms = seen(fresh(), counts)
        assert terms["perplexity"] == pytest.approx(perplexity)
        assert terms["codebook_usage"] == usage
    assert float(fresh().terms()["codebook_usage"]) == 0


def test_usage_forgets(alone: Any) -> None:
    """A code that was chosen once counts for 1 / (1 - 0.9) steps, rounded down: 0.9^9 > 1/e > 0.9^10."""
    state = CodebookState(CodebookConfig(size=2, ema_decay=0.9), 1, CPU)
    seen(state, [1, 1])
    usage = [seen(state, [1, 0], step)["codebook_usage"] for step in range(1, 12)]
    assert usage == [1.0] * 9 + [0.5] * 2


def test_codes_that_began_again_are_not_yet_used(alone: Any) -> None:
    config = CodebookConfig(size=4, ema_decay=0.9, restart_below=0.5, restart_every_steps=2)
    state = CodebookState(config, 1, CPU)
    terms = [seen(state, [6, 2, 0, 0], step) for step in range(4)]
    assert [t["codes_restarted"] for t in terms] == [0, 3, 3, 5]  # 2 (1 - 0.9^2) < 0.5 once
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for t in terms:
        assert t["codebook_usage"] == 0.5
        assert t["perplexity"] == pytest.approx(math.exp(entropy))
