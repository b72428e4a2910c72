"""Recipes: complete runs as functions. `RECIPES` is what `loupe recipes` lists and the launchers accept by name. No torch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import fsspec

from trainer.config import RunConfig
from trainer.config_text import from_yaml, suggest
from trainer.errors import KEYS_MEND, UserError, one_line, storage_errors
from trainer.recipes import autoencoder, models, paper
from trainer.recipes.demo import demo, demo_autoencoder, photos, photos_autoencoder
from trainer.recipes.latent_network import demo_latent_network, latent_network


def _by_paradigm(recipe: Callable[[paper.Paradigm], RunConfig]) -> dict[str, Callable[[], RunConfig]]:
    """One recipe for each paradigm, of the same text."""
    named: dict[str, Callable[[], RunConfig]] = {}
    for paradigm, suffix in paper.SUFFIXES.items():
        variant = partial(recipe, paradigm)
        variant.__doc__ = (recipe.__doc__ or "").replace(":", f", as {paradigm}:", 1)
        named[recipe.__name__ + suffix] = variant
    return named


RECIPES: dict[str, Callable[[], RunConfig]] = {
    **{f.__name__: f for f in (demo, photos, demo_autoencoder, photos_autoencoder, demo_latent_network)},
    **_by_paradigm(paper.imagenet_256),
    **_by_paradigm(paper.imagenet_512_lpl),
    **_by_paradigm(paper.cc12m_256),
    **_by_paradigm(paper.cc12m_512_lpl),
    **_by_paradigm(paper.s320m_512_lpl),
    **{
        f.__name__: f
        for f in (
            models.sd3_medium_512,
            models.finetune,
            models.imagenet_256_dit,
            models.cc12m_256_unet,
            models.cc12m_256_pixart,
            latent_network,
            autoencoder.autoencoder_kl_f8,
            autoencoder.autoencoder_kl_f4,
            autoencoder.autoencoder_kl_f16,
            autoencoder.autoencoder_kl_f8_16ch,
            autoencoder.autoencoder_kl_f8_32ch,
            autoencoder.autoencoder_vq_f8,
            autoencoder.autoencoder_vq_f4,
            autoencoder.autoencoder_vq_f16,
            autoencoder.autoencoder_decoder,
            autoencoder.autoencoder_asymmetric,
            autoencoder.autoencoder_light_decoder,
            autoencoder.autoencoder_encoder,
            autoencoder.autoencoder_second_stage,
        )
    },
}


def load(name: str) -> RunConfig:
    """The config of a recipe's name, or of a YAML file (path or URL) that a run wrote.

    Raises:
        UserError: neither.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.endswith((".yaml", ".yml")):
        try:
            with fsspec.open(name, "r") as file:
                text = file.read()
        except storage_errors(ValueError) as e:
            keys = f", or {KEYS_MEND}" if "://" in name else ""
            raise UserError(
                f"{name}: the config cannot be read ({one_line(e)}); give a recipe's name or a run's config.yaml{keys}"
            ) from None
        return from_yaml(text, source=name)
    hint = f"; did you mean {name}/config.yaml?" if Path(name).is_dir() else suggest(name, RECIPES)
    raise UserError(f"no recipe {name!r}{hint}")
