"""Modules as one file: it computes what they compute, and needs nothing of ours."""

import ast
import sys
import types
from typing import Any

import einops
import pytest
import torch

from tests.export_runs import SMALL_MMDIT, small
from trainer import rng
from trainer.config import LatentDiffusionConfig
from trainer.export.bundle import LIBRARIES, Symbol, bundle
from trainer.export.portable.relayout import rearrange
from trainer.models.condition import Condition
from trainer.models.denoisers import build_denoiser

CPU = torch.device("cpu")


def executed(source: str, name: str) -> Any:
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look themselves up there
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def imported(source: str) -> set[str]:
    """Top names of what is imported, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_a_module_that_reaches_into_another() -> None:
    """`draws.raw(...)` of another package; annotations by types that are not taken along."""
    with pytest.raises(AssertionError, match=r"uniform is in data\.draws .*; give one another name"):
        bundle("trainer.rng", title="All of it.")
    source = bundle(
        "trainer.errors", parts=[Symbol("trainer.rng", "normal"), Symbol("trainer.rng", "_GOLDEN")], title="Noise."
    )
    assert imported(source) <= LIBRARIES | sys.stdlib_module_names
    assert "draws." not in "\n".join(line.partition("#")[0] for line in source.splitlines())
    theirs = executed(source, "bundled_rng")
    purposes: tuple[rng.Purpose, ...] = ("sample", "noise")
    for seed, positions, purpose in ((0, [0, 1, 7], purposes[0]), (3, [2**40], purposes[1])):
        want = rng.normal(seed, positions, purpose, (4, 3, 2), device=CPU)
        assert torch.equal(theirs.normal(seed, positions, purpose, (4, 3, 2), device=CPU), want)
    assert '"""Randomness as' not in source
    assert "the worst to approximate by fractions" in source, "what documents a constant goes along"


@pytest.mark.parametrize("layout", ["sd3", "shared, positions: rotary"])
def test_imports_within_functions_and_einops(layout: str) -> None:
    """`build_denoiser` imports the network that it builds; `rearrange` comes along."""
    task = small(f"task.model={SMALL_MMDIT % f', layout: {layout}'}").task
    assert isinstance(task, LatentDiffusionConfig)
    source = bundle(
        "trainer.models.condition", parts=[Symbol("trainer.models.denoisers", "build_denoiser")], title="A network."
    )
    assert imported(source) <= LIBRARIES | sys.stdlib_module_names
    theirs = executed(source, "bundled_denoiser")
    sizes: dict[str, Any] = {"latent_channels": 4, "token_width": 8, "pooled_width": 8, "num_classes": None}
    ours, other = build_denoiser(task.model, **sizes), theirs.build_denoiser(task.model, **sizes)
    with torch.no_grad():
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        other.load_state_dict(ours.state_dict())
        generator = torch.Generator().manual_seed(0)
        zt, tokens = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(2, 5, 8, generator=generator)
        mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
        want = ours(zt, torch.tensor([10.0, 900.0]), Condition(tokens, tokens[:, 0], mask))
        got = other(zt, torch.tensor([10.0, 900.0]), theirs.Condition(tokens, tokens[:, 0], mask))
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_what_is_not_needed_is_left_out() -> None:
    source = bundle(
        "trainer.models.condition", parts=[Symbol("trainer.models.text_encoders", "ClassEncoder")], title="Classes."
    )
    names = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert {"ClassEncoder", "TextEncoder", "TokenInput", "Condition", "UserError"} <= names
    assert not names & {"ByteEncoder", "EncoderBlock", "attention", "build_text_encoder", "ClassLabelConfig"}


def test_stubs_and_what_may_not_be_imported() -> None:
    frozen = [
        Symbol("trainer.models.frozen_text", "FrozenText"),
        Symbol("trainer.models.frozen_encoder", "FrozenEncoder"),
    ]
    with pytest.raises(AssertionError, match="not to be imported in an export"):
        bundle("trainer.models.condition", parts=frozen, title="Text.")  # what loads encoders fetches files
    stub = Symbol("trainer.models.frozen_encoder", "load_encoder")
    source = bundle("trainer.models.condition", parts=frozen, stubs=[stub], title="Text.")
    assert imported(source) <= LIBRARIES | sys.stdlib_module_names


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes"),
    [
        ("b n (three h d) -> three b h n d", (2, 5, 24), {"three": 3, "h": 4}),
        ("b h n d -> b n (h d)", (2, 4, 5, 3), {}),
        ("b d h w -> b (h w) d", (2, 3, 4, 5), {}),
        ("b (h w) (p q c) -> b c (h p) (w q)", (2, 6, 8), {"h": 2, "w": 3, "p": 2, "q": 2}),
        ("a b -> b a", (3, 2), {}),
    ],
)
def test_rearrange_is_einops_own(pattern: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    x = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    assert torch.equal(rearrange(x, pattern, **sizes), einops.rearrange(x, pattern, **sizes))
    with pytest.raises(AssertionError):
        rearrange(x[0], pattern, **sizes)
