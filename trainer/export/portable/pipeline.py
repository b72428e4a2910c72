"""Pictures from prompts, as the run that trained the model draws them: the same noise for a seed, the same steps."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from trainer.diffusion.guidance import Guidance, guided
from trainer.rng import normal
from trainer.tensors import images_to_pixels


class TextToImagePipeline(DiffusionPipeline):
    """`pipe("a red fox", seed=0).images[0]`. A model of classes takes their numbers, as `"7"` or `7`."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"  # type: ignore[assignment]
    _optional_components: ClassVar[list[str]] = [  # type: ignore[misc]
        "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"
    ]  # fmt: skip

    def __init__(
        self, transformer, vae, scheduler, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,  # type: ignore[no-untyped-def]
        text_encoder_3=None, tokenizer_3=None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | int | Sequence[str | int],
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        seed: int | None = None,
        first_position: int = 0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """
        Args:
            prompt: one or several; an empty text is a text, not the absence of one.
            num_inference_steps, guidance_scale, height, width, guidance_interval, guidance_rescale: absent, the run's own.
                The interval is of times between which guidance is applied, 0 data and 1 noise.
            seed: the noise of prompt i follows from (seed, first_position + i) alone, as in the run: neither the batch nor
                the other prompts change a picture.
            generator: in place of a seed, as in every pipeline of diffusers.
            latents: in place of both, the noise itself, (B, C, h, w).
            output_type: pil, np or pt (values in [0, 1]), or latent.

        Raises:
            ValueError: a size that the model cannot draw, a class that it has not learned, or an argument out of its range.
        """
        if not isinstance(prompt, str | int) and not len(prompt):
            raise ValueError("prompt: there is none; give one or several")
        if seed is not None and (generator is not None or latents is not None):
            raise ValueError("seed: goes without generator and latents, which are noise in place of it")
        _check(num_inference_steps, guidance_scale, guidance_interval, guidance_rescale, seed)
        config, device = self.transformer.config, self._execution_device
        prompts = [str(p) for p in ([prompt] if isinstance(prompt, str | int) else prompt)]
        defaults, of_latents = config["defaults"], config["latents"]
        height, width = height or defaults["resolution"], width or defaults["resolution"]
        multiple = of_latents["downsampling"] * self.transformer.denoiser.latent_multiple
        if height % multiple or width % multiple:
            raise ValueError(
                f"height and width: {height} x {width} are no multiples of {multiple}, as this model needs"
            )
        guidance = Guidance(
            defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
            defaults["guidance_interval"] if guidance_interval is None else guidance_interval,
            defaults["guidance_rescale"] if guidance_rescale is None else guidance_rescale,
        )
        shape = tuple(side // of_latents["downsampling"] for side in (height, width))
        if latents is None:
            latents = self._noise((of_latents["channels"], *shape), len(prompts), seed, first_position, generator)
        z, count = latents.to(device, torch.float32), len(prompts)
        condition = self._condition([*prompts, *[None] * count])
        conditions = {count: condition.first(count), 2 * count: condition}
        flow = config["noise"]["kind"] == "flow"

        def model(zt: Tensor, t_B: Tensor) -> Tensor:
            time_B = (t_B * 1000).float() if flow else t_B.float()
            out: Tensor = self.transformer(zt, time_B, conditions[len(zt)])
            return out

        predict = guided(model, guidance)
        self._set_times(num_inference_steps or defaults["num_steps"], height, width)
        for step in self.progress_bar(self.scheduler.timesteps):
            # the scheduler's float32, as the decimal number that it stands for: an interval's end must not fall beside it
            prediction = predict(z, round(float(step) / 1000, 6) if flow else int(step))
            z = self.scheduler.step(prediction, step, z, return_dict=False)[0]
        self.maybe_free_model_hooks()
        images = self._images(z, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(
        self, shape: tuple[int, ...], count: int, seed: int | None, first: int,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:  # fmt: skip
        if seed is None:
            return randn_tensor((count, *shape), generator=generator, device=self._execution_device)
        return normal(seed, range(first, first + count), "sample", shape, device=torch.device("cpu"))

    def _condition(self, prompts: Sequence[str | None]) -> Any:
        if self.transformer.text is not None:
            return self.transformer(None, None, self.transformer.text.prepare(prompts).to(self._execution_device))
        names = [f"_{n}" if n > 1 else "" for n in (1, 2, 3)]
        encoders = [getattr(self, f"text_encoder{name}") for name in names]
        tokenizers = [getattr(self, f"tokenizer{name}") for name in names]
        text = self.transformer.frozen_text(
            [e for e in encoders if e is not None], [t for t in tokenizers if t is not None]
        )
        return text(text.prepare(prompts).to(self._execution_device))

    def _set_times(self, num_steps: int, height: int, width: int) -> None:
        """As in training: from noise to data in equal steps of time, before any shift."""
        device, noise = self._execution_device, self.transformer.config["noise"]
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            self.scheduler.set_timesteps(num_steps, device=device)
            return
        if noise["shift_base_px"]:
            self.scheduler.set_shift((height * width) ** 0.5 / noise["shift_base_px"])
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_steps, num_steps).tolist(), device=device)

    def _images(self, z: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return z
        of_latents = self.transformer.config["latents"]
        raw = z / of_latents["scale"] + of_latents["shift"]
        images = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0].float()
        if output_type == "pt":
            return (images / 2 + 0.5).clamp(0, 1)
        if output_type == "np":
            return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in images_to_pixels(images)]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Its code would not be in the folder, which nothing could open."""
        raise NotImplementedError("copy the folder that this pipeline was loaded from, as a whole: save_pretrained leaves its "
                                  "code out")  # fmt: skip


def _check(
    steps: int | None, scale: float | None, interval: tuple[float, float] | None, rescale: float | None, seed: int | None
) -> None:  # fmt: skip
    """As `loupe sample` has them; None is the run's own."""
    if steps is not None and steps < 1:
        raise ValueError(f"num_inference_steps: {steps} is not positive; 25 to 50 are usual")
    if scale is not None and not 0 <= scale < float("inf"):
        raise ValueError(f"guidance_scale: {scale} is no scale; take 0 or more, 1 for none")
    if interval is not None and not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"guidance_interval: {interval}; give two shares of the diffusion's time, 0 (data) to 1 (noise), the "
                         "smaller first")  # fmt: skip
    if rescale is not None and not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale: {rescale} is not within 0 to 1; 0.7 is usual")
    if seed is not None and seed < 0:
        raise ValueError(f"seed: {seed} is negative")
