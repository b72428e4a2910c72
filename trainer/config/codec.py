"""The frozen autoencoder that a task reads."""

from pydantic import PositiveInt

from trainer.config.section import Section


class CodecConfig(Section):
    """A frozen autoencoder of diffusers: `AutoencoderKL`, `AsymmetricAutoencoderKL`, `AutoencoderTiny` or `VQModel`. Scale
    and shift are its own config's. Channels and downsampling are declared, so that a run can be checked without its weights."""

    url: str
    """Folder with `config.json` and safetensors weights; `repo://PATH` lies within the code itself."""
    latent_channels: PositiveInt = 4
    downsampling: PositiveInt = 8
    """Side of an image over side of its latents."""
