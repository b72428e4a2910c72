"""The runs of `loupe experiment lpl`: does the latent perceptual loss help at a size that two CPU cores train? No torch.

One pre-trained checkpoint a paradigm; from it, each variant goes on for the same steps on the same images with the same noise,
once a seed. A variant differs from the baseline by its loss alone. LPL has the paper's weight, with which it is nine tenths of
the loss here (of the paper's a fifth); and, beside that, one by the rule that weights its rivals.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from trainer.config import (
    CheckpointConfig,
    DataConfig,
    DatasetConfig,
    DecodedRGBConfig,
    EMAConfig,
    ImageSpaceConfig,
    InitFromConfig,
    LatentDiffusionConfig,
    LatentLPIPSConfig,
    LPIPSConfig,
    LPLConfig,
    MetricsConfig,
    OptimConfig,
    ParadigmConfig,
    ParallelConfig,
    PerceptualConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    RateScheduleConfig,
    ReweightingConfig,
    RunConfig,
    SampledConfig,
    SelfPerceptualConfig,
    replace,
)
from trainer.recipes.demo import demo
from trainer.recipes.latent_network import demo_latent_network

PARADIGMS = {"ddpm_eps": "eps", "ddpm_v": "v", "flow": "flow"}
"""The paper's three, and what run names call them."""
RESOLUTION = 64
BASELINE, LPL = "baseline", "lpl"
RIVALS_ON = "ddpm_eps"
"""The paradigm on which rivals and options run."""
RIVAL_SHARE = 0.1
"""Variance of a rival's weighted term over that of the denoising loss (Berrada et al. 2025, section A.4)."""


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    pretrain_steps: int = 1000
    steps: int = 120
    """Of each continuation."""
    batch_size: int = 32
    seeds: int = 3
    """Continuations of the baseline and of LPL."""
    rival_seeds: int = 2
    """Of each rival: its first so many seeds."""
    option_seeds: int = 1
    """Of each option of LPL: its first so many seeds."""
    train_images: int = 1600
    """First so many of the 1,854; the rest are held out."""
    num_images: int = 256
    """Images sampled of each run, and real ones they are compared with."""
    heldout_images: int = 128
    sampling_steps: int = 15
    guidance_scale: float = 2.0
    tiny_model: bool = False


FULL = Size()
SMOKE = Size(
    pretrain_steps=3, steps=2, batch_size=4, seeds=1, rival_seeds=1, option_seeds=1, train_images=64, num_images=12,
    heldout_images=4, sampling_steps=2, tiny_model=True,
)  # fmt: skip
"""Every part of the path in seconds; its figures mean nothing."""


@dataclass(frozen=True)
class Variant:
    """What a continuation adds to the baseline."""

    name: str
    label: str
    """In the report."""
    group: str
    """`main`: on every paradigm; `rival`: on DDPM-eps alone; `option`: there too, with fewer seeds."""
    cost: float
    """Seconds of a step over the baseline's, about; for estimates before anything is measured."""
    perceptual: PerceptualConfig | None = None
    phase: PhasePerceptualConfig | None = None
    paradigm: Mapping[str, str] = field(default_factory=dict)
    """Fields of the paradigm that differ."""
    needs: tuple[str, ...] = ()
    """`lpips`: the file of `--lpips-weights`; `latent_network`: the folder of `--latent-network`."""


def variants(lpips_weights: str | None = None, latent_network: str | None = None) -> tuple[Variant, ...]:
    """All of them. Without a network that one needs, its config names none and it cannot run."""
    share = PhasePerceptualConfig(variance_share=RIVAL_SHARE)
    whole = PhasePerceptualConfig()

    def rival(name: str, label: str, cost: float, perceptual: PerceptualConfig, *needs: str) -> Variant:
        return Variant(name, label, "rival", cost, perceptual, share, needs=needs)

    def option(name: str, label: str, cost: float = 2.0, **changes: object) -> Variant:
        return Variant(name, label, "option", cost, _lpl(**changes), whole)

    lpips = LPIPSConfig(network="alex_shift_tolerant", url=lpips_weights)
    gate = {"tau_reference_px": RESOLUTION}
    return (
        Variant(BASELINE, "no perceptual loss", "main", 1.0),
        Variant(LPL, f"LPL, w = {whole.weight:g}", "main", 2.0, _lpl(), whole),
        Variant("lpl_share", f"LPL, weighted as the rivals ({RIVAL_SHARE:g})", "rival", 2.0, _lpl(), share),
        Variant("min_snr", "min-SNR weighting", "rival", 1.0, paradigm={"weighting": "min_snr"}),
        Variant(
            "reweighting", "reweighting (Eq. 15)", "rival", 1.1, ReweightingConfig(of=_lpl(), **gate), whole
        ),
        Variant("lpl_detached", "LPL, deviation detached", "rival", 2.0, _lpl(detach_deviation=True), whole),
        rival("decoded_rgb", "squared error of decoded RGB", 2.0, DecodedRGBConfig(chunk_size=16, **gate)),
        rival(
            "image_space", "image-space LPIPS (CogVideo)", 2.5, ImageSpaceConfig(lpips=lpips, chunk_size=16, **gate), "lpips"
        ),
        rival(
            "latent_lpips", "E-LatentLPIPS", 1.5, LatentLPIPSConfig(url=latent_network or "", **gate), "latent_network"
        ),
        rival("self_perceptual", "Self-Perceptual, middle block", 1.8, SelfPerceptualConfig(**gate)),
        option("lpl_separate", "LPL, separate statistics", statistics="separate"),
        option("lpl_uniform", "LPL, uniform depth weights", depth_weights="uniform"),
        option("lpl_unmasked", "LPL, outliers not masked", mask_outliers="none"),
        option("lpl_sampled", "LPL, estimated from 8 samples a step", 1.5, sampled=SampledConfig(samples_per_rank=8)),
    )  # fmt: skip


def _lpl(**changes: object) -> LPLConfig:
    return LPLConfig.model_validate({"tau_reference_px": RESOLUTION, "chunk_size": 16, **changes})


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class PlannedRun:
    name: str
    variant: str
    """Empty: a pre-training."""
    paradigm: str
    seed: int
    config: RunConfig
    cost: float
    """Seconds of a step over the baseline's."""
    after: tuple[str, ...] = ()
    """Runs that must be done before."""

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)


def planned_runs(
    size: Size, chosen: tuple[Variant, ...], runs_dir: str, paradigms: Sequence[str] = tuple(PARADIGMS)
) -> Iterator[PlannedRun]:
    """Pre-trainings first, then baseline and LPL; then rivals and options by seed, so that an early stop leaves whole
    comparisons."""
    seeds = {"main": size.seeds, "rival": size.rival_seeds, "option": size.option_seeds}
    for paradigm in paradigms:
        name = pretrain_name(paradigm)
        yield PlannedRun(name, "", paradigm, 0, _pretrain(size, paradigm, name), 1.0)
    for groups in (("main",), ("rival", "option")):
        for seed in range(max(seeds[group] for group in groups)):
            for paradigm in paradigms if groups == ("main",) else (RIVALS_ON,):
                for variant in chosen:
                    if variant.group in groups and seed < seeds[variant.group] and paradigm in paradigms:
                        name = run_name(paradigm, variant.name, seed)
                        config = _continuation(size, paradigm, variant, seed, name, runs_dir)
                        after = (pretrain_name(paradigm),)
                        yield PlannedRun(name, variant.name, paradigm, seed, config, variant.cost, after)


def latent_network_run(size: Size, data_url: str, num_classes: int) -> RunConfig:
    """The demo's latent network, on a dataset with classes."""
    run = demo_latent_network()
    assert run.task.kind == "latent_network"
    phases = tuple(replace(phase, steps=3, batch_size=8) for phase in run.phases) if size.tiny_model else run.phases
    return replace(
        run,
        name="latent-network",
        task=replace(run.task, num_classes=num_classes),
        data=replace(run.data, datasets={"classes": DatasetConfig(url=data_url)}, num_workers=0),
        phases=phases,
        parallel=ParallelConfig(num_threads=1),
    )


def pretrain_name(paradigm: str) -> str:
    return f"{PARADIGMS[paradigm]}-pretrain"


def run_name(paradigm: str, variant: str, seed: int) -> str:
    return f"{PARADIGMS[paradigm]}-{variant}-{seed}"


def _pretrain(size: Size, paradigm: str, name: str) -> RunConfig:
    """At 2e-3, falling to the continuation's rate."""
    phase = PhaseConfig(
        name="pretrain", steps=size.pretrain_steps, resolution=RESOLUTION, batch_size=size.batch_size, learning_rate=2e-3,
        rate_schedule=RateScheduleConfig(kind="cosine", final_factor=0.25), ema_decay=0.99,
    )  # fmt: skip
    kind = ParadigmConfig.model_validate({"kind": paradigm})
    return small_run(kind, name, phase, seed=0, warmup_steps=50, **_model_and_data(size))


def _continuation(size: Size, paradigm: str, variant: Variant, seed: int, name: str, runs_dir: str) -> RunConfig:
    """A constant rate and an average of the last 30 steps or so, the same with and without a perceptual loss: the paper's
    halved half-life for LPL (Figure 10) would mix two effects."""
    phase = PhaseConfig(
        name="continue", steps=size.steps, resolution=RESOLUTION, batch_size=size.batch_size, learning_rate=5e-4,
        ema_decay=0.97, perceptual=variant.phase,
    )  # fmt: skip
    kind = ParadigmConfig.model_validate({"kind": paradigm, **variant.paradigm})
    # the pre-training had seed 0: the order of images and the noise are others here
    run = small_run(kind, name, phase, seed=1 + seed, warmup_steps=10, **_model_and_data(size))
    task = run.task
    assert isinstance(task, LatentDiffusionConfig)
    run = replace(run, init_from=InitFromConfig(url=os.path.join(runs_dir, pretrain_name(paradigm))))
    return replace(run, task=replace(task, perceptual=variant.perceptual)) if variant.perceptual else run


class _ModelAndData(TypedDict):
    train_images: int
    tiny_model: bool


def _model_and_data(size: Size) -> _ModelAndData:
    return {"train_images": size.train_images, "tiny_model": size.tiny_model}


def small_run(
    paradigm: ParadigmConfig, name: str, phase: PhaseConfig, *, seed: int, warmup_steps: int, train_images: int,
    tiny_model: bool,
) -> RunConfig:  # fmt: skip
    """The demo's model, autoencoder and emoji, on one rank with one thread."""
    run = demo()
    task = run.task
    assert isinstance(task, LatentDiffusionConfig)
    assert task.model.kind == "mmdit"
    assert task.text.kind == "bytes"
    model, text = task.model, replace(task.text, max_bytes=40)
    if tiny_model:
        model = replace(model, num_blocks=2, num_heads=2, head_dim=16)
        text = replace(text, max_bytes=24, width=32, num_blocks=1, num_heads=2)
    emoji = replace(run.data.datasets["emoji"], max_samples=train_images)
    return RunConfig(
        name=name,
        seed=seed,
        task=replace(task, model=model, text=text, paradigm=paradigm),
        data=DataConfig(datasets={"emoji": emoji}, num_workers=0),
        phases=(phase,),
        optim=OptimConfig(betas=(0.9, 0.99), weight_decay=0.0, warmup_steps=warmup_steps),
        ema=EMAConfig(),
        parallel=ParallelConfig(num_threads=1),
        checkpoint=CheckpointConfig(every_steps=400, keep_last=2),
        metrics=MetricsConfig(every_steps=10),
    )
