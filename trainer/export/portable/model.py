"""A text-to-image denoiser, with its text encoder where that was trained with it, as a diffusers model.

Its tensors have the names that the run gave them: `denoiser.*` and `text.*`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

PARTS: dict[str, Any] = {}
"""Classes by their names: those that the run has."""


class Fields:
    """A section of the run's config: its fields, by name."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            setattr(self, name, _fields(value))


def _fields(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Fields(value)
    return tuple(map(_fields, value)) if isinstance(value, list | tuple) else value


class TextToImageModel(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """
    Args:
        network, encoder: the class of each, its `config`, and its further `arguments`; `encoder` is a trained one, or stands
            for frozen ones, which are no part of this model. (Not by the names of the modules: diffusers would find these.)
        latents: `channels` and `downsampling`, and the `scale` and `shift` of the codec's.
        noise: `kind` of the paradigm, and `shift_base_px`.
        defaults: of a picture: `resolution`, `num_steps`, `guidance_scale`, `guidance_interval`, `guidance_rescale`.
    """

    @register_to_config
    def __init__(
        self, network: dict[str, Any], encoder: dict[str, Any], latents: dict[str, Any], noise: dict[str, Any],
        defaults: dict[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        self.text = None
        if not encoder["frozen"]:
            self.text = PARTS[encoder["class"]](Fields(encoder["config"]), **encoder["arguments"])
        self.denoiser = PARTS[network["class"]](Fields(network["config"]), **network["arguments"])

    def frozen_text(self, encoders: Sequence[nn.Module], tokenizers: Sequence[Any]) -> Any:
        """The frozen encoders as one, as they stood beside the model in training.

        Raises:
            ValueError: there are not as many as the model was trained with.
        """
        config = Fields(self.config["encoder"]["config"])
        wanted = config.encoders  # type: ignore[attr-defined]
        if len(wanted) != len(encoders) or len(wanted) != len(tokenizers):
            raise ValueError(
                f"the model was trained with {len(wanted)} text encoders and {len(encoders)} are loaded: give those that "
                "README.md names as text_encoder=, tokenizer=, text_encoder_2=, ..."
            )
        one, all_of_them = PARTS["FrozenEncoder"], PARTS["FrozenText"]
        parts = [one(*given) for given in zip(wanted, encoders, tokenizers, strict=True)]
        return all_of_them(config, encoders=parts)

    def forward(self, zt_BCHW: Tensor | None, time_B: Tensor | None, text: Any) -> Any:
        """The network's prediction, float32. Without latents: what `text`, as the encoder's `prepare` gives it, is to the
        network, so that it is encoded once for all steps."""
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype if half else None, enabled=half):
            if zt_BCHW is None:
                assert self.text is not None, "frozen encoders stand beside the model"
                return self.text(text)
            return self.denoiser(zt_BCHW, time_B, text).float()
