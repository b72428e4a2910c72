"""Whether the folder that an export wrote computes, in diffusers' own classes, what the trained module does."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from trainer.errors import UserError, one_line
from trainer.models.reconstruction import Reconstruction, TrainedAutoencoder

LARGEST_DIFFERENCE = 1e-6
"""Of the largest value: float32's rounding, where the same operations ran in another order."""


@torch.no_grad()
def difference_to_diffusers(folder: Path, module: Reconstruction, batches: Sequence[Tensor]) -> float:
    """Largest difference between what diffusers reads from `folder`, in float32, and the module: of raw latents and of what
    is decoded, relative to the largest value of each.

    Args:
        module: whose weights have been rounded as those in the folder were.
        batches: of what it reconstructs.

    Raises:
        UserError: diffusers cannot read it, or the difference is more than rounding.
    """
    autoencoder = module.autoencoder
    found = read_by_diffusers(folder, type(autoencoder))
    worst: dict[str, float] = {}

    def compare(what: str, theirs: Tensor, ours: Tensor) -> None:
        difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-30)).item()
        if not difference <= LARGEST_DIFFERENCE:  # nor is it where a value is not finite
            raise UserError(
                f"{what} of the exported {type(autoencoder).__name__}, read by diffusers, differ by {difference:.2g} of their "
                f"largest value from the trained one's; {LARGEST_DIFFERENCE:.0g} is allowed, so nothing was written; take the "
                "version of diffusers that trained it"
            )
        worst[what] = max(worst.get(what, 0.0), difference)

    for x in batches:
        want = module(x)
        if isinstance(found, VQModel):
            raw = found.encode(x).latents
            compare("distances of codes", *_distances(found, raw, want.drawn))
            # the same codes on both sides: of two that are equally near, each side may have taken another
            decoded = found.decode(want.drawn, force_not_quantize=True).sample
        else:
            raw = found.encode(x).latent_dist.mean
            decoded = found.decode(want.drawn).sample
        compare("latents", raw, want.raw)
        compare("reconstructions", decoded, want.x)
    return max(worst.values())


def read_by_diffusers(folder: Path, kind: type[TrainedAutoencoder]) -> TrainedAutoencoder:
    """In float32. It warns of a shift that its class has no argument for, which is there for `Codec` to read: not shown."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        found: TrainedAutoencoder = kind.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise UserError(
            f"diffusers cannot read the exported {kind.__name__} ({one_line(e)}), so nothing was written"
        ) from e
    finally:
        diffusers_logging.set_verbosity(verbosity)
    return found


def _distances(found: VQModel, raw: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Squared, of each latent pixel to the code that diffusers takes, and to ours; (B, H, W), plus what they round beside."""
    theirs, ours = found.quantize(raw)[0], drawn
    near = [(raw.double() - codes.double()).square().sum(1) for codes in (theirs, ours)]
    # a distance comes of squares of latents and codes, and is no more exact than those
    scale = raw.double().square().sum(1).max() + found.quantize.embedding.weight.double().square().sum(1).max()
    return near[0] + 10 * scale, near[1] + 10 * scale
