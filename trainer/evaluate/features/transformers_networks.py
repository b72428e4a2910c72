"""CLIP and DINOv2, as classes of transformers. Its image processors are not used: they differ between versions, and the fast
ones want torchvision; what they do is pinned here.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from trainer.errors import UserError, one_line
from trainer.evaluate.features.networks import LoadedNetwork, exactly
from trainer.evaluate.features.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    normalised,
    pillow_bicubic_bytes,
)
from trainer.evaluate.features.weights import OPTION, WeightsFiles, load_transformers, transformers_folder

DINOV2_SIDE = 224
PROMPT = "as given, without a prefix"
"""Hessel et al. (2021) put "A photo depicts " before captions; torchmetrics, and so most papers, do not."""


class ClipFeatures(nn.Module):
    """Projected image embeddings, not normalised, and those of prompts."""

    name = "clip"

    def __init__(self, model: CLIPModel, tokenizer: TokenizersBackend) -> None:
        super().__init__()
        self.model, self._tokenizer = model, tokenizer
        config: Any = model.config
        self.dimensions = int(config.projection_dim)
        self.side = int(config.vision_config.image_size)
        self.max_tokens = int(config.text_config.max_position_embeddings)
        self.preprocessing = f"Pillow bicubic with antialiasing to {self.side} px, 8 bits; CLIP's mean and deviation"

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        images = normalised(pillow_bicubic_bytes(pixels_BCHW, self.side), CLIP_MEAN, CLIP_STD)
        out: Tensor = self.model.get_image_features(pixel_values=images).pooler_output
        return out

    def text_features(self, prompts: Sequence[str]) -> tuple[Tensor, list[bool]]:
        """(B, D) float32, and which prompts were longer than CLIP takes: those lose their end."""
        batch = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self.max_tokens, padding_side="right",
            return_tensors="pt",
        )  # fmt: skip
        device = self.model.device
        with exactly(device):
            # causal, and read at the end token: padding behind it is not seen
            out: Tensor = self.model.get_text_features(input_ids=batch["input_ids"].to(device)).pooler_output
        return out.float(), [bool(encoding.overflowing) for encoding in batch.encodings]


class Dinov2Features(nn.Module):
    """The class token behind the last norm, as Stein et al. (2023) take it for FD-DINOv2."""

    name = "dinov2"
    preprocessing = f"Pillow bicubic with antialiasing to {DINOV2_SIDE} px, 8 bits; ImageNet's mean and deviation"

    def __init__(self, model: Dinov2Model) -> None:
        super().__init__()
        self.model = model
        self.dimensions = int(model.config.hidden_size)

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        images = normalised(pillow_bicubic_bytes(pixels_BCHW, DINOV2_SIDE), IMAGENET_MEAN, IMAGENET_STD)
        out: Tensor = self.model(pixel_values=images).pooler_output
        return out


def load_clip(url: str) -> LoadedNetwork:
    """Raises:
    UserError: as `transformers_folder` and `load_transformers`; or the tokenizer is damaged or not the model's.
    """
    files = transformers_folder(url, tokenizer=True)
    model = load_transformers(CLIPModel, CLIPConfig, files)
    assert isinstance(model, CLIPModel)
    return LoadedNetwork(ClipFeatures(model, _tokenizer(files, model)), files)


def load_dinov2(url: str) -> LoadedNetwork:
    """Raises:
    UserError: as `transformers_folder` and `load_transformers`.
    """
    files = transformers_folder(url, tokenizer=False)
    model = load_transformers(Dinov2Model, Dinov2Config, files)
    assert isinstance(model, Dinov2Model)
    config: Any = model.config
    if DINOV2_SIDE % config.patch_size:
        raise UserError(f"{OPTION}: {url}: patches of {config.patch_size} px do not divide {DINOV2_SIDE}")
    return LoadedNetwork(Dinov2Features(model), files)


def _tokenizer(files: WeightsFiles, model: CLIPModel) -> TokenizersBackend:
    cls = TokenizersBackend if files.has_fast_tokenizer else CLIPTokenizer
    folder = str(files.tokenizer)
    try:
        tokenizer = cls.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # the tokenizers library raises plain Exception
        raise UserError(f"{OPTION}: {folder}: the tokenizer cannot be read ({one_line(e)}); copy it again") from None
    tokenizer.truncation_side = "right"
    config: Any = model.config
    vocabulary = int(config.text_config.vocab_size)
    if tokenizer.pad_token_id is None or len(tokenizer) > vocabulary:
        raise UserError(f"{OPTION}: {folder}: {len(tokenizer)} tokens, pad token {tokenizer.pad_token!r}, beside a model of "
                        f"{vocabulary} tokens; give the model's own tokenizer")  # fmt: skip
    if not tokenizer("")["input_ids"]:
        raise UserError(f"{OPTION}: {folder}: gives an empty prompt no token; give the model's own tokenizer")
    return tokenizer
