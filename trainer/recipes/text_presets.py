"""Published text encoders as configs. A URL is a folder on storage of your own, copied once from where its authors
publish it; widths are the published ones. No torch."""

from typing import Literal

from trainer.config import EncoderConfig, FrozenTextConfig


def sd3_text(
    root_url: str,
    *,
    t5_tokens: Literal[256, 77] = 256,
    dropout: float = 0.464,
    padding: Literal["masked", "seen"] = "masked",
) -> FrozenTextConfig:
    """Stable Diffusion 3's and 3.5's three encoders (Esser et al. 2024), from the folder of their diffusers pipeline.

    CLIP-L beside CLIP-G in the channels, T5-XXL after them along the tokens: 77 + t5_tokens tokens of 4,096 channels,
    pooled text 768 + 1,280. Each encoder alone is given zeros for `dropout` of the samples: at 0.464 a tenth of them
    have no text at all (0.464^3), so take it with `caption_dropout: 0`.

    The published weights were trained with `padding="seen"`: T5 and the denoiser look at padding too. Masked is for models
    trained from scratch.
    """
    clip_l, clip_g, t5 = (
        {"url": root_url, "weights_folder": f"text_encoder{n}", "tokenizer_folder": f"tokenizer{n}"}
        for n in ("", "_2", "_3")
    )
    return FrozenTextConfig(
        encoders=(
            EncoderConfig(**clip_l, family="clip", width=768, pooled_width=768, hidden_state=-2,
                          dropout=dropout, null_text="zeros", padding=padding),
            EncoderConfig(**clip_g, family="clip", width=1280, pooled_width=1280, hidden_state=-2, join="channels",
                          dropout=dropout, null_text="zeros", padding=padding),
            EncoderConfig(**t5, family="t5", width=4096, max_tokens=t5_tokens, dropout=dropout, null_text="zeros",
                          padding=padding),
        )
    )  # fmt: skip


def sdxl_text(root_url: str) -> FrozenTextConfig:
    """SDXL's two encoders (Podell et al. 2023), from the folder of its diffusers pipeline: CLIP-L and CLIP-G beside each
    other, 77 tokens of 2,048 channels; pooled text of CLIP-G alone, 1,280. Dropped captions are zeros, as the published
    pipeline has it (`force_zeros_for_empty_prompt`)."""
    clip_l, clip_g = (
        {"url": root_url, "weights_folder": f"text_encoder{n}", "tokenizer_folder": f"tokenizer{n}"} for n in ("", "_2")
    )
    return FrozenTextConfig(
        encoders=(
            EncoderConfig(**clip_l, family="clip", width=768, hidden_state=-2, null_text="zeros"),
            EncoderConfig(**clip_g, family="clip", width=1280, pooled_width=1280, hidden_state=-2, join="channels",
                          null_text="zeros"),
        )
    )  # fmt: skip


def clip_l_text(url: str) -> FrozenTextConfig:
    """CLIP-L (Radford et al. 2021) alone, as Stable Diffusion 1: 77 tokens of 768 channels after the final norm, and as
    pooled text the state of the end token, projected where the weights hold CLIP's projection (Stable Diffusion's own
    copy does not). `url`: the encoder's folder, its tokenizer in it."""
    return FrozenTextConfig(encoders=(EncoderConfig(url=url, family="clip", width=768, pooled_width=768),))


def t5_text(url: str, width: int, *, max_tokens: int = 120) -> FrozenTextConfig:
    """A T5 encoder alone, as PixArt-alpha (XXL: width 4,096, 120 tokens); pooled text is the mean over real tokens.
    Widths: small 512, base 768, large 1,024, XL 2,048, XXL 4,096."""
    return FrozenTextConfig(
        encoders=(EncoderConfig(url=url, family="t5", width=width, pooled_width=width, max_tokens=max_tokens),)
    )
