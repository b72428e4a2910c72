"""The trainings that the latent perceptual loss's paper (Berrada et al., ICLR 2025) compares, at its size and at one that two
CPU cores train. No torch.

A training goes on from a pre-trained checkpoint, or begins afresh, and differs from others of its seed by what it names alone.
Tables and figures (`trainer.recipes.paper_exhibits`) share them by name.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from trainer.config import (
    CheckpointConfig,
    DatasetConfig,
    DecodedRGBConfig,
    EMAConfig,
    InitFromConfig,
    LatentDiffusionConfig,
    LatentLPIPSConfig,
    LPLConfig,
    ParadigmConfig,
    PerceptualConfig,
    PhaseConfig,
    PhasePerceptualConfig,
    RateScheduleConfig,
    ReweightingConfig,
    RunConfig,
    SelfPerceptualConfig,
    replace,
)
from trainer.recipes import paper
from trainer.recipes.lpl_experiment import PARADIGMS, RIVAL_SHARE, small_run
from trainer.recipes.text_presets import sdxl_text

Loss = Literal["plain", "lpl", "min_snr", "reweighting", "rgb", "latent_lpips", "latent_lpips_gated", "self_perceptual"]
"""plain: denoising alone. reweighting: Eq. 15's. rgb: squared error of decoded images. _gated: at LPL's noise levels."""


@dataclass(frozen=True)
class Training:
    """What one differs in; the rest is its size's."""

    loss: Loss = "plain"
    paradigm: paper.Paradigm = "ddpm_eps"
    dataset: str = ""
    """Empty: the size's first."""
    low: bool = False
    """At the lower of the paper's two resolutions."""
    weight: float | None = None
    """w_LPL; None: the size's, for the paradigm."""
    tau: float | None = 3.0
    num_maps: int | None = None
    """Of the decoder, from its first; None: all."""
    block: int | None = None
    """Of Self-Perceptual."""
    separate: bool = False
    """Statistics of LPL's features, of each map alone."""
    uniform: bool = False
    """Depth weights of LPL."""
    plain_steps: int = 0
    """Before `steps`, without a perceptual loss."""
    steps: int | None = None
    """None: the size's."""
    batch_size: int | None = None
    scratch: bool = False
    """No pre-training."""
    profiles: bool = False
    """Keep what the EMA's width can be chosen by afterwards."""

    @property
    def name(self) -> str:
        """By which it is shared; without its seed."""
        words = [PARADIGMS[self.paradigm], self.loss]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("loss", "paradigm") and value != field.default:
                words.append(field.name if value is True else f"{field.name}{value:g}" if isinstance(value, float) else
                             value if field.name == "dataset" else f"{field.name}{value}")  # fmt: skip
        return "-".join(words).replace("_steps", "").replace("_size", "").replace("num_", "")


@dataclass(frozen=True)
class PlannedTraining:
    name: str
    training: Training | None
    """None: a pre-training."""
    seed: int
    config: RunConfig
    after: str | None
    """The run that it begins with."""

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)


def planned(scale: "Scale", training: Training, seed: int, runs_dir: str) -> list[PlannedTraining]:
    """It, after the pre-training that it begins with."""
    before = scale.pretraining(training, runs_dir)
    config = scale.config(training, seed, runs_dir)
    first = [] if before is None else [PlannedTraining(before.name, None, 0, before, None)]
    return [*first, PlannedTraining(config.name, training, seed, config, before.name if before else None)]


def perceptual(
    training: Training, *, tau_reference_px: int, latent_network: str | None, **decoding: object
) -> PerceptualConfig | None:
    """The loss's section of the task; None: it has none."""
    gate = {"tau_reference_px": tau_reference_px}
    lpl = LPLConfig.model_validate({
        **gate, **decoding, "num_maps": training.num_maps,
        **({"statistics": "separate"} if training.separate else {}),
        **({"depth_weights": "uniform"} if training.uniform else {}),
    })  # fmt: skip
    if training.loss == "lpl":
        return lpl
    if training.loss == "reweighting":
        return ReweightingConfig.model_validate({"of": lpl, **gate})
    if training.loss == "rgb":
        return DecodedRGBConfig.model_validate({**gate, **decoding})
    if training.loss.startswith("latent_lpips"):
        return LatentLPIPSConfig.model_validate({"url": latent_network or "", **gate})
    if training.loss == "self_perceptual":
        return SelfPerceptualConfig.model_validate({"block": training.block, **gate})
    return None


def in_phase(training: Training, weight: float) -> PhasePerceptualConfig | None:
    """LPL and Eq. 15 with LPL's weight, all others by the rule that the paper weights its rivals by (A.4)."""
    if training.loss in ("plain", "min_snr"):
        return None
    tau = None if training.loss in ("latent_lpips", "self_perceptual") else training.tau
    if training.loss in ("lpl", "reweighting"):
        return PhasePerceptualConfig(weight=weight, tau=tau)
    return PhasePerceptualConfig(variance_share=RIVAL_SHARE, tau=tau)


def _paradigm(training: Training) -> ParadigmConfig:
    weighting = {"weighting": "min_snr"} if training.loss == "min_snr" else {}
    return ParadigmConfig.model_validate({"kind": training.paradigm, **weighting})


def _with_phases(
    run: RunConfig, training: Training, post: PhaseConfig, section: PerceptualConfig | None, every_steps: int
) -> RunConfig:
    """The run with the phases and the loss that the training names. All checkpoints stay: Figures 14 to 18 look at them."""
    task = run.task
    assert isinstance(task, LatentDiffusionConfig)
    plain = [replace(post, name="plain", steps=training.plain_steps, perceptual=None)] if training.plain_steps else []
    kept = CheckpointConfig(every_steps=every_steps, keep_last=2 + sum(p.steps for p in (*plain, post)) // every_steps)
    run = replace(
        run, checkpoint=kept, phases=(*plain, post), task=replace(task, perceptual=section) if section else task
    )
    if training.profiles:
        every = max(1, post.steps // 20)
        run = replace(run, ema=EMAConfig(profiles=(0.05, 0.1), snapshot_steps=every))
    return run


# ------------------------------------------------------------------------------------------------------------- two cores


@dataclass(frozen=True)
class SmallScale:
    """The demo's MMDiT, autoencoder and emoji, on one core a run."""

    label: str = "small"
    seeds: int = 3
    pretrain_steps: int = 1000
    steps: int = 120
    """Of a training after pre-training."""
    datasets: tuple[str, ...] = ("emoji",)
    """By name; the first is that of all but Table 2."""
    dataset_urls: Mapping[str, str] | None = None
    """Of datasets beside the emoji."""
    resolutions: tuple[int, int] = (32, 64)
    """The lower one and that of all where nothing else is said."""
    num_maps: int = 5
    """Of the decoder."""
    weights: tuple[float, ...] = (0.02, 0.07, 0.2, 0.7, 3.0)
    """Figure 9's grid, increasing."""
    blocks: tuple[int, ...] = (1, 2, 4)
    """Of the denoiser, for Self-Perceptual."""
    latent_network: str | None = None
    """Of E-LatentLPIPS; None: there is none."""
    plain_steps: tuple[int, ...] = (0, 60, 360)
    """Table 4's."""
    scratch_steps: int = 1000
    look_steps: int = 40
    """Between the looks of Figures 15, 17 and 18."""
    fine_tune_low: bool = False
    """Whether these are at the lower resolution."""
    num_images: int = 256
    train_images: int = 1600
    """First so many of the 1,854."""
    sampling_steps: int = 15
    many_sampling_steps: int = 100
    """Table 9's."""
    tiny_model: bool = False

    def weight(self, paradigm: str) -> float:
        """w_LPL where nothing else is said: with it LPL is about a fifth of the loss, as in the paper with its 3 (section
        4.3)."""
        return 0.07 if paradigm == "ddpm_eps" else 0.2

    def every_steps(self, *, scratch: bool) -> int:
        """Between checkpoints."""
        return max(1, self.scratch_steps // 5) if scratch else self.look_steps

    def guidance(self, low: bool) -> float:
        return 1.5 if low else 2.0

    def batch_size(self, low: bool) -> int:
        """Of trainings after pre-training; from noise it is twice that."""
        return 4 if self.tiny_model else 16

    def _run(self, training: Training, name: str, phase: PhaseConfig, *, seed: int, warmup_steps: int) -> RunConfig:
        run = small_run(
            _paradigm(training), name, phase, seed=seed, warmup_steps=warmup_steps, train_images=self.train_images,
            tiny_model=self.tiny_model,
        )  # fmt: skip
        url = (self.dataset_urls or {}).get(training.dataset)
        if url is None:
            return run
        return replace(run, data=replace(run.data, datasets={training.dataset: DatasetConfig(url=url)}))

    def pretraining(self, training: Training, runs_dir: str) -> RunConfig | None:
        """At the lower resolution for Table 2 alone: two resolutions of a model of 64 px cost little more than one."""
        if training.scratch:
            return None
        words = ["pretrain", *(["low"] if training.low else []), *([training.dataset] if training.dataset else [])]
        plain = Training(paradigm=training.paradigm, dataset=training.dataset)
        phase = self._from_noise("pretrain", self.pretrain_steps, training.low)
        return self._run(plain, f"{PARADIGMS[training.paradigm]}-{'-'.join(words)}", phase, seed=0, warmup_steps=50)

    def _from_noise(self, name: str, steps: int, low: bool) -> PhaseConfig:
        """At 2e-3, falling to the rate that trainings go on with."""
        return PhaseConfig(
            name=name, steps=steps, resolution=self.resolutions[not low], batch_size=2 * self.batch_size(low),
            learning_rate=2e-3, rate_schedule=RateScheduleConfig(kind="cosine", final_factor=0.25), ema_decay=0.99,
        )  # fmt: skip

    def config(self, training: Training, seed: int, runs_dir: str) -> RunConfig:
        """The average is of the last 30 steps or so, the same with and without a perceptual loss: the paper's halved half-life
        for LPL (Figure 10) would mix two effects."""
        steps = training.steps or (self.scratch_steps if training.scratch else self.steps)
        weight = self.weight(training.paradigm) if training.weight is None else training.weight
        loss = in_phase(training, weight)
        if training.scratch:
            post = replace(self._from_noise("train", steps, training.low), perceptual=loss)
        else:
            batch_size = training.batch_size or self.batch_size(training.low)
            post = PhaseConfig(
                name="continue", steps=steps, resolution=self.resolutions[not training.low], batch_size=batch_size,
                # a larger batch has a larger rate, as in the paper's Table 7
                learning_rate=5e-4 * batch_size / self.batch_size(training.low), ema_decay=0.97, perceptual=loss,
            )  # fmt: skip
        name = f"{training.name}-{seed}"
        # the pre-training had seed 0: the order of images and the noise are others here
        run = self._run(training, name, post, seed=1 + seed, warmup_steps=50 if training.scratch else 10)
        section = perceptual(training, tau_reference_px=self.resolutions[1],
                             latent_network=self.latent_network, chunk_size=16)  # fmt: skip
        run = _with_phases(run, training, post, section, self.every_steps(scratch=training.scratch))
        before = self.pretraining(training, runs_dir)
        return (
            run if before is None else replace(run, init_from=InitFromConfig(url=os.path.join(runs_dir, before.name)))
        )


SMALL = SmallScale()
SMOKE = SmallScale(
    label="smoke", seeds=2, pretrain_steps=3, steps=2, weights=(0.07, 3.0), blocks=(1,), plain_steps=(0, 1), scratch_steps=4,
    look_steps=2, num_images=12, train_images=64, sampling_steps=2, many_sampling_steps=3, tiny_model=True,
)  # fmt: skip
"""Every part of the path in seconds; its figures mean nothing."""


# ------------------------------------------------------------------------------------------------------- the paper's size


@dataclass(frozen=True)
class FullScale:
    """The paper's models and steps, on a cluster; what they need is in `trainer.recipes.paper`. All have one autoencoder: the
    paper names SDXL's for ablations, and has one baseline, of FID 4.88, in them and in its main table."""

    label: str = "full"
    seeds: int = 1
    steps: int = 120_000
    datasets: tuple[str, ...] = ("imagenet", "cc12m", "s320m")
    dataset_urls: Mapping[str, str] | None = None
    """Absent: datasets/NAME."""
    resolutions: tuple[int, int] = (256, 512)
    num_maps: int = 5
    weights: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0, 30.0)
    blocks: tuple[int, ...] = (8, 16, 28)
    latent_network: str | None = "models/latent-network"
    plain_steps: tuple[int, ...] = (0, 50_000, 400_000)
    scratch_steps: int = 100_000
    look_steps: int = 10_000
    fine_tune_low: bool = True
    sampling_steps: int = 50
    many_sampling_steps: int = 250

    def weight(self, paradigm: str) -> float:
        return 3.0

    def every_steps(self, *, scratch: bool) -> int:
        return max(1, self.scratch_steps // 5) if scratch else self.look_steps

    def guidance(self, low: bool) -> float:
        return 1.5 if low else 2.0

    def batch_size(self, low: bool) -> int:
        return 2048 if low else 1024

    def _run(self, training: Training, name: str, phases: tuple[PhaseConfig, ...]) -> RunConfig:
        dataset = training.dataset or self.datasets[0]
        text = paper.CLASSES if dataset == "imagenet" else sdxl_text("models/sdxl")
        run = paper.paper_run(name, training.paradigm, dataset, text, phases, self.guidance(training.low))
        task = run.task
        assert isinstance(task, LatentDiffusionConfig)
        run = replace(run, name=name, task=replace(task, paradigm=_paradigm(training)))
        url = (self.dataset_urls or {}).get(dataset)
        return replace(run, data=replace(run.data, datasets={dataset: DatasetConfig(url=url)})) if url else run

    def pretraining(self, training: Training, runs_dir: str) -> RunConfig | None:
        """On ImageNet for all (Table 2)."""
        if training.scratch:
            return None
        plain = Training(paradigm=training.paradigm)
        return self._run(plain, f"{PARADIGMS[training.paradigm]}-pretrain", (paper.PRETRAIN,))

    def config(self, training: Training, seed: int, runs_dir: str) -> RunConfig:
        low = training.low or training.scratch
        steps = training.steps or (self.scratch_steps if training.scratch else 200_000 if low else self.steps)
        post = paper.phase("post", steps, self.resolutions[not low], lpl=training.loss == "lpl")
        weight = self.weight(training.paradigm) if training.weight is None else training.weight
        post = replace(post, perceptual=in_phase(training, weight))
        if training.batch_size:
            rate = post.learning_rate * training.batch_size / post.batch_size
            post = replace(post, batch_size=training.batch_size, learning_rate=rate)
        run = replace(self._run(training, f"{training.name}-{seed}", (post,)), seed=1 + seed)
        section = perceptual(training, tau_reference_px=256, latent_network=self.latent_network)
        run = _with_phases(run, training, post, section, self.every_steps(scratch=training.scratch))
        before = self.pretraining(training, runs_dir)
        if before is None:
            return run
        # what text has in place of classes begins afresh
        strict = (training.dataset or self.datasets[0]) == self.datasets[0]
        return replace(run, init_from=InitFromConfig(url=os.path.join(runs_dir, before.name), strict=strict))


FULL = FullScale()
Scale = SmallScale | FullScale
"""How large everything is."""
