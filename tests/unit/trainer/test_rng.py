"""Randomness depends on seed, position and purpose, and on nothing else."""

import torch

from trainer.rng import normal, uniform

CPU = torch.device("cpu")


def test_a_sample_keeps_its_noise_in_any_batch() -> None:
    whole = normal(1, range(100, 108), "noise", (4, 8, 8), device=CPU)
    parts = [normal(1, range(a, a + 2), "noise", (4, 8, 8), device=CPU) for a in (100, 102, 104, 106)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(uniform(1, range(100, 108), "timestep")[3:5], uniform(1, [103, 104], "timestep"))


def test_seed_position_and_purpose_each_matter() -> None:
    base = normal(1, [5], "noise", (64,), device=CPU)
    for other in (normal(2, [5], "noise", (64,), device=CPU), normal(1, [6], "noise", (64,), device=CPU),
                  normal(1, [5], "sample", (64,), device=CPU)):  # fmt: skip
        assert abs(torch.corrcoef(torch.stack([base, other])[:, 0])[0, 1]) < 0.5
        assert not torch.equal(base, other)
    assert uniform(1, [5], "timestep") != uniform(1, [5], "caption_dropout")


def test_distributions() -> None:
    u = uniform(0, range(20_000), "timestep")
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    torch.testing.assert_close(
        torch.histc(u, 10, 0, 1) / 20_000, torch.full((10,), 0.1, dtype=u.dtype), atol=0.01, rtol=0
    )
    z = normal(0, range(2000), "noise", (16,), device=CPU)
    assert abs(z.mean()) < 0.02
    assert abs(z.std() - 1) < 0.02
