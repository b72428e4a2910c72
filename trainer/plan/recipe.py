"""All that a latent-diffusion recipe computes and holds, counted without weights, data or a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import LatentDiffusionConfig, PhaseConfig, RunConfig, replace
from trainer.diffusion.paradigms import build_paradigm
from trainer.errors import UserError
from trainer.losses.gate import gate_share, threshold
from trainer.losses.lpl import build_lpl
from trainer.models.autoencoders import Codec
from trainer.models.condition import Condition
from trainer.models.text_encoders import TokenInput
from trainer.plan.counting import FrozenCount, ModuleCount, count_frozen, count_trained, fake, signature
from trainer.plan.frozen import codec_of, text_encoder_of
from trainer.tasks.latent_diffusion import TextToImage


@dataclass(frozen=True)
class Parameters:
    """Shapes of what is trained, by the unit that gathers them; the last list is the root's own."""

    units: tuple[tuple[tuple[int, ...], ...], ...]
    root: tuple[tuple[int, ...], ...]

    @property
    def all(self) -> tuple[tuple[int, ...], ...]:
        return (*(shape for unit in self.units for shape in unit), *self.root)


@dataclass(frozen=True)
class PhaseCount:
    phase: PhaseConfig
    model: ModuleCount
    encoder: FrozenCount | None
    """None: latents are read from the dataset."""
    loss: FrozenCount | None
    """Of the latent perceptual loss, of samples inside its gate."""
    inside: float
    """Share of the samples that are inside."""
    chunk_size: int


@dataclass(frozen=True)
class RecipeCount:
    parameters: Parameters
    text: tuple[FrozenCount, ...]
    text_bytes: int
    """Weights of frozen text encoders, bf16, whole on each rank."""
    codec_bytes: int
    """Weights of the autoencoder, float32, and of the loss's copy of its decoder, bf16."""
    buffer_bytes: int
    """Of the trained module, whole on each rank."""
    phases: tuple[PhaseCount, ...]
    notes: tuple[str, ...]
    """What was assumed, and what is not in the count."""


def count_recipe(run: RunConfig, *, bf16: bool = True) -> RecipeCount:
    """
    Args:
        bf16: as a GPU's autocast has it; otherwise float32, as on a CPU.

    Raises:
        UserError: another task than latent diffusion; a codec that is not there and that no published one stands for.
    """
    task = run.task
    if task.kind != "latent_diffusion":
        raise UserError(f"task.kind: {task.kind} cannot be planned yet; give a recipe of latent_diffusion")
    notes: list[str] = []
    with fake():
        whole = TextToImage(task)
        units = whole.units()
        parameters = _parameters(whole, units)
        buffers = sum(buffer.nbytes for buffer in whole.buffers())
    codec, assumed = codec_of(task.codec)
    notes += [assumed] if assumed else []
    codec_bytes = sum(p.numel() for p in codec.parameters()) * 4
    if bf16:
        codec.to(torch.bfloat16)  # what autocast computes in; meta tensors have none
    text, text_bytes = _text(task, notes)
    models: dict[int, ModuleCount] = {}
    encoders: dict[int, FrozenCount] = {}
    losses: dict[int, FrozenCount] = {}
    phases = []
    for phase in run.phases:
        side = phase.resolution
        if side not in models:
            models[side] = _count_model(task, side, units, bf16=bf16)
        if not run.data.latents and side not in encoders:
            encoders[side] = _count_encoder(codec, side)
        share = 0.0
        if phase.perceptual:
            if task.perceptual.kind == "lpl":
                if side not in losses:
                    losses[side], decoder_bytes = _count_lpl(task, codec, side, notes)
                    codec_bytes += decoder_bytes * (len(losses) == 1)
                paradigm = build_paradigm(task.paradigm, resolution=side)
                bound = threshold(phase.perceptual, paradigm, side, task.perceptual.tau_reference_px)
                share = gate_share(paradigm, bound)
            else:
                notes.append(
                    f"phase {phase.name}: {task.perceptual.kind} is not counted, neither its time nor its memory"
                )
        loss = losses.get(side) if phase.perceptual else None
        chunk = task.perceptual.chunk_size if task.perceptual.kind == "lpl" else 0
        phases.append(PhaseCount(phase, models[side], encoders.get(side), loss, share, chunk))
    if run.optim.kind == "muon":
        notes.append("optim.kind: muon keeps one moment of each matrix; two are counted, as of AdamW")
    if run.data.buckets:
        notes.append("data.buckets: counted as squares of the phase's resolution, whose area the buckets have")
    return RecipeCount(parameters, text, text_bytes, codec_bytes, buffers, tuple(phases), tuple(dict.fromkeys(notes)))


def _parameters(module: nn.Module, units: list[nn.Module]) -> Parameters:
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    return Parameters(
        tuple(tuple(tuple(p.shape) for p in unit.parameters()) for unit in units),
        tuple(tuple(p.shape) for p in module.parameters() if id(p) not in inside),
    )


# -------------------------------------------------------------------------------------------------------------- the model


def _count_model(task: LatentDiffusionConfig, side: int, units: list[nn.Module], *, bf16: bool) -> ModuleCount:
    smaller = fewer_blocks(task)
    with fake():
        kinds = {signature(unit) for unit in TextToImage(smaller).units()}
    built = smaller if kinds >= {signature(unit) for unit in units} else task
    latent_side = side // task.codec.downsampling

    def build() -> tuple[nn.Module, list[nn.Module]]:
        module = TextToImage(built)
        return module, module.units()

    def call(module: nn.Module, images: int) -> Tensor:
        zt = torch.zeros(images, task.codec.latent_channels, latent_side, latent_side)
        out: Tensor = module(zt, torch.zeros(images), text_input(task, images))
        return (out.float() - torch.zeros_like(zt)).square().mean()

    return count_trained(build, call, units, bf16=bf16)


def fewer_blocks(task: LatentDiffusionConfig) -> LatentDiffusionConfig:
    """The same model with as few blocks as have one of each kind."""
    model: Any = task.model
    if model.kind == "mmdit":
        dual = model.num_dual_attention_blocks
        kinds = {"num_dual_attention_blocks": 2 if dual == model.num_blocks else min(dual, 1)}
        blocks = min(model.num_blocks, 2 + bool(dual))
        if blocks >= model.num_blocks:
            return task
        return replace(task, model=replace(model, num_blocks=blocks, **kinds))
    if model.kind in ("dit", "pixart"):
        return replace(task, model=replace(model, num_blocks=min(model.num_blocks, 2)))
    return task


def text_input(task: LatentDiffusionConfig, images: int) -> Any:
    """What the trained module is given as its text, of these sizes; all captions as long as they may be."""
    text = task.text
    if text.kind == "bytes":
        tokens = text.max_bytes + 1
        return TokenInput(torch.zeros(images, tokens, dtype=torch.long), torch.ones(images, tokens, dtype=torch.bool))
    if text.kind == "classes":
        return TokenInput(torch.zeros(images, 1, dtype=torch.long), torch.ones(images, 1, dtype=torch.bool))
    tokens = sum(group[0].max_tokens for group in text.groups)
    pooled = torch.zeros(images, text.pooled_width) if text.pooled_width else None
    return Condition(
        torch.zeros(images, tokens, text.width), pooled, torch.ones(images, tokens, dtype=torch.bool)
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- what is frozen


def _text(task: LatentDiffusionConfig, notes: list[str]) -> tuple[tuple[FrozenCount, ...], int]:
    if task.text.kind != "frozen":
        return (), 0
    counts, size = [], 0
    for i, config in enumerate(task.text.encoders):
        with fake():
            found = text_encoder_of(config)
            if found is None:
                notes.append(
                    f"task.text.encoders.{i}: no sizes of a {config.family} {config.width} wide, so neither its memory nor its "
                    "time is in the plan"
                )
                continue
            model, call = found
            size += sum(parameter.nbytes for parameter in model.parameters())
            counts.append(count_frozen(_bound(call, model), bf16=False))
    notes.append("frozen text encoders: the published sizes by family and width; captions as long as they may be")
    return tuple(counts), size


def _bound(call: Callable[[nn.Module, int], Tensor], model: nn.Module) -> Callable[[int], Tensor]:
    return lambda images: call(model, images)


def _count_encoder(codec: Codec, side: int) -> FrozenCount:
    return count_frozen(lambda images: codec.encode(torch.zeros(images, 3, side, side, device="meta")), bf16=False)


def _count_lpl(task: LatentDiffusionConfig, codec: Codec, side: int, notes: list[str]) -> tuple[FrozenCount, int]:
    """Of a chunk of samples inside the gate, and the bytes of the decoder's own copy."""
    config = task.perceptual
    assert config.kind == "lpl"
    if config.sampled or config.crop or config.decoder_url:
        notes.append(
            "task.perceptual: counted as the exact loss with the full decoder, which costs more than estimators"
        )
        config = replace(config, sampled=None, crop=None, decoder_url=None)
    loss = build_lpl(config, codec)
    shape = (codec.latent_channels, side // codec.downsampling, side // codec.downsampling)

    def call(images: int) -> None:
        z0_hat = torch.zeros(images, *shape, device="meta", requires_grad=True)
        with torch.no_grad():
            targets = loss.decoder(torch.zeros(images, *shape, device="meta"))
        loss_B, _ = loss.of_features(loss.decoder(z0_hat), targets)
        torch.autograd.grad(loss_B.sum(), z0_hat)

    return count_frozen(call, bf16=False, grad=True), sum(t.nbytes for t in loss.decoder.state_dict().values())
