"""Feature networks for tests: the published layouts with weights from a seed, and one of our own that is fast and exact."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers.models.clip.configuration_clip import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from data import draws
from tests.text_models import _clip_tokenizer
from trainer.evaluate.features.inception import Inception

OURS = "tests.feature_networks:blocks"
"""As `--network` takes it."""


def inception_state() -> dict[str, Tensor]:
    """Weights at which activations neither vanish nor grow, a pure function of the names."""
    state = {}
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Inception().state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(1)
            continue
        u = torch.from_numpy(draws.uniform(0, name, count=shape.numel())).view(shape)
        if name.endswith(("running_var", "bn.weight")):
            value = 0.5 + u
        elif len(shape) > 1:
            value = (2 * u - 1) * (6.0 / shape[1:].numel()) ** 0.5
        else:
            value = 0.4 * (2 * u - 1)
        state[name] = value.float()
    return state


def pixels(count: int, side: int) -> Tensor:
    """Noise, uint8 (count, 3, side, side), a pure function of both."""
    numbers = draws.raw(1, "pixels", side, count=count * 3 * side * side)
    return torch.from_numpy((numbers >> np.uint64(56)).astype(np.uint8)).view(count, 3, side, side)


def write_clip(folder: Path) -> CLIPModel:
    """A whole CLIP, as transformers writes it, 16 features; and its tokenizer."""
    tokenizer = _clip_tokenizer("<|endoftext|>")
    tokenizer.save_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.eval().save_pretrained(folder)
    return model


def write_dinov2(folder: Path) -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config)
    model.eval().save_pretrained(folder)
    return model


class Blocks:
    """Means of 4 x 4 blocks of each colour: 48 features, exact in float32."""

    name, dimensions, preprocessing = "blocks", 48, "means of 4 x 4 blocks, in [0, 1]"

    def __init__(self) -> None:
        self.images = 0
        """That it has seen."""

    def to(self, device: torch.device) -> "Blocks":
        return self

    def features(self, pixels_BCHW: Tensor) -> Tensor:
        self.images += len(pixels_BCHW)
        return torch.nn.functional.adaptive_avg_pool2d(pixels_BCHW.double(), 4).flatten(1).float() / 255.0


def blocks(weights: str | None) -> Blocks:
    return Blocks()
