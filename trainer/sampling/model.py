"""A trained text-to-image model that draws pictures: whole in this process; or sharded, amid its training.

A picture follows from prompt, seed and position. The network always computes `lot` pictures at once, each at the place in
the lot that its position gives it, and an empty place computes a stand-in: matrix products of another shape round otherwise,
and so a picture would differ by a level here and there with the batch that it was drawn in.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method

from trainer.checkpoint.collective import Ranks
from trainer.config import LatentDiffusionConfig, RunConfig
from trainer.diffusion.paradigms import Paradigm, build_paradigm
from trainer.diffusion.samplers import Evaluations
from trainer.errors import UserError
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.condition import Condition, joined
from trainer.models.text_encoders import TextEncoder, build_text_encoder
from trainer.parallel.apply import autocast
from trainer.sampling.draw import cost, draw_latents, noise_of
from trainer.sampling.prompts import Prompt, caption_of
from trainer.sampling.settings import SampleSettings
from trainer.sampling.source import opened
from trainer.sampling.weights import fill
from trainer.tasks.latent_diffusion import TextToImage
from trainer.tensors import images_to_pixels

LOT = 8


class SamplingModel:
    """
    Args:
        step: of the checkpoint.
        sha256: of a file of weights.
        weights: which of its weights, as `open` takes it.
        source: URL of what was read.
    """

    def __init__(
        self, config: RunConfig, module: TextToImage, text: TextEncoder, codec: Codec, device: torch.device, *,
        step: int = 0, weights: str = "ema", source: str = "", sha256: str | None = None,
    ) -> None:  # fmt: skip
        assert isinstance(config.task, LatentDiffusionConfig)
        self.config, self.step, self.weights, self.source, self.sha256 = config, step, weights, source, sha256
        self.task: LatentDiffusionConfig = config.task
        self.device, self.codec, self.text = device, codec, text
        self.module = module
        self.exact = False
        """Draw in float32 also where training computes in bfloat16."""
        self.lot = LOT
        """Pictures that the network computes at once."""

    @classmethod
    def open(
        cls, source: str, device: torch.device, *, weights: str = "ema", group: dist.ProcessGroup | None = None
    ) -> "SamplingModel":
        """Read a run's newest checkpoint that verifies, or the one at `source`: of it the tensors that are needed, and the
        frozen networks that the run's config names. A collective where ranks are: each has a whole copy.

        Args:
            source: a run folder, or one of its checkpoints; a path or any fsspec URL.
            weights: ema; raw, those of the last step; ema:SIGMA or ema:SIGMA@STEP, the average of that relative width, put
                together from the run's snapshots; or the URL of a .safetensors file of the model's tensors by their names.
            group: must carry CPU objects; absent: the default group.

        Raises:
            UserError: no run of latent diffusion there, no checkpoint, no such weights.
            CheckpointError: storage failed.
        """
        run = opened(source)
        task = run.config.task
        if not isinstance(task, LatentDiffusionConfig):
            raise UserError(f"{source}: a run of {task.kind}, which draws no pictures; give one of latent_diffusion")
        with torch.device("meta"):
            module = TextToImage(task)
        module.to_empty(device=device).eval().requires_grad_(False)
        found, ranks = fill(module, run, weights, group), Ranks(group)
        text = ranks.on_all(lambda: module.text or build_text_encoder(task.text, device))
        codec = ranks.on_all(lambda: load_codec(task.codec).to(device))
        return cls(run.config, module, text, codec, device, step=found.step, weights=found.weights, source=found.source,
                   sha256=found.sha256)  # fmt: skip

    def _precision(self) -> AbstractContextManager[None]:
        return nullcontext() if self.exact else autocast(self.device)

    def paradigm(self, settings: SampleSettings) -> Paradigm:
        return build_paradigm(self.task.paradigm, resolution=settings.side)

    def cost(self, settings: SampleSettings) -> Evaluations:
        """Of one picture."""
        return cost(self.paradigm(settings), settings)

    # ---------------------------------------------------------------------------------------------------------- prompts

    def check_prompts(self, prompts: Sequence[Prompt]) -> list[bool]:
        """Of each prompt, whether it is longer than the text encoder takes, and so is cut.

        Raises:
            UserError: captions for a model of classes, or the other way round; no such class.
        """
        captions = [self._caption(prompt) for prompt in prompts]
        cut = []
        for start in range(0, len(captions), 256):
            chunk = captions[start : start + 256]
            # one by one where it is asked which: encoders say how many
            some = self.text.prepare(chunk).num_cut
            cut += [bool(some) and self.text.prepare([caption]).num_cut > 0 for caption in chunk]
        return cut

    def _caption(self, prompt: Prompt) -> str | None:
        """As the text encoder takes it."""
        text = self.task.text
        return caption_of(prompt, text.num_classes if text.kind == "classes" else None)

    @torch.no_grad()
    def _conditions(self, captions: Sequence[str | None]) -> Condition:
        """One caption at a time, so that neighbours do not change a caption's states by their rounding."""
        found: dict[str | None, Condition] = {}
        for caption in dict.fromkeys(captions):
            found[caption] = self._condition(caption)
        return joined([found[caption] for caption in captions])

    def _condition(self, caption: str | None) -> Condition:
        text = self.text.prepare([caption]).to(self.device)
        if self.text.frozen:
            return self.text(text)
        with self._precision():
            return self.module.encode_text(text)

    # --------------------------------------------------------------------------------------------------------- pictures

    @torch.no_grad()
    def images(self, prompts: Sequence[Prompt], positions: Sequence[int], settings: SampleSettings) -> Tensor:
        """Pictures (B, 3, H, W), uint8, on the model's device. An image's noise follows from (seed, position) alone, and
        which images are drawn together does not matter. Whole lots, positions k * lot to (k + 1) * lot - 1, cost least.

        Raises:
            UserError: as `SampleSettings.check` and `check_prompts`; or a picture is not finite.
        """
        settings.check(self.task)
        assert len(prompts) == len(positions) == len(set(positions)), "each picture has a position of its own"
        captions = [self._caption(prompt) for prompt in prompts]
        height, width = settings.size
        out = torch.empty((len(prompts), 3, height, width), dtype=torch.uint8, device=self.device)
        for places in self._lots(positions):
            rows = [row for row in places if row is not None]
            # an empty place takes what stands in another: any would do
            filled = [rows[0] if row is None else row for row in places]
            images = self._draw([captions[row] for row in filled], [positions[row] for row in filled], settings)
            taken = [place for place, row in enumerate(places) if row is not None]
            if not bool(images[taken].isfinite().all()):
                raise UserError(
                    f"{self.source}: pictures at positions {positions[rows[0]]} to {positions[rows[-1]]} are not finite; take "
                    "less --guidance, or another checkpoint: this one may be of a run that diverged"
                )
            out[rows] = images_to_pixels(images[taken])
        return out

    def _lots(self, positions: Sequence[int]) -> Iterator[list[int | None]]:
        """Rows of `positions` by their place in the network's lots, in order of positions; None: an empty place."""
        lots: dict[int, list[int | None]] = {}
        for row, position in sorted(enumerate(positions), key=lambda pair: pair[1]):
            lots.setdefault(position // self.lot, [None] * self.lot)[position % self.lot] = row
        yield from lots.values()

    def _draw(self, captions: Sequence[str | None], positions: Sequence[int], settings: SampleSettings) -> Tensor:
        """Images (lot, 3, H, W), float32, unclamped."""
        paradigm, count = self.paradigm(settings), len(captions)
        condition = self._conditions([*captions, *[None] * count])
        conditions = {count: condition.first(count), 2 * count: condition}

        def model(zt: Tensor, t_B: Tensor) -> Tensor:
            with self._precision():
                out: Tensor = self.module(zt, paradigm.model_time(t_B), conditions[len(zt)])
            return out.float()

        noise = noise_of(settings, positions, self.codec.latent_channels, self.codec.downsampling).to(self.device)
        return self.codec.decode(draw_latents(model, paradigm, noise, settings)).float()


class ShardedModel(SamplingModel):
    """One whose module is sharded over ranks, as it is while it is trained: `images` is a collective, of one lot at a time, and
    gathers a block at a time. It draws with the weights that the module has then, and leaves its mode to the caller."""

    def __init__(
        self, config: RunConfig, module: TextToImage, text: TextEncoder, codec: Codec, device: torch.device, *,
        step: int = 0, weights: str = "ema", source: str = "", sha256: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config, module, text, codec, device, step=step, weights=weights, source=source, sha256=sha256)
        # the embeddings are the root's own parameters: a call of the encoder alone would find them sharded
        register_fsdp_forward_method(module, "encode_text")

    def _conditions(self, captions: Sequence[str | None]) -> Condition:
        """As many passes through the sharded encoder on each rank, however many captions are alike."""
        found = super()._conditions(captions)
        if not self.text.frozen:
            for _ in range(self.lot + 1 - len(set(captions))):
                self._condition(None)
        return found
