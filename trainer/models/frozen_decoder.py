"""The decoder of a frozen autoencoder as losses run it: features or images of latents, gradients to the latents alone."""

from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.autoencoders import Codec


class FrozenDecoder(nn.Module):
    """Feature maps of scaled latents, in the order of `map_names`."""

    def __init__(self, codec: Codec, num_maps: int | None = None) -> None:
        """`num_maps`: run no deeper than this many maps; None: all of them.

        Raises:
            UserError: the decoder has fewer maps.
        """
        super().__init__()
        if num_maps is not None and num_maps > len(codec.map_names):
            raise UserError(f"task.perceptual.num_maps: {num_maps}, but this decoder has {len(codec.map_names)} maps: "
                            f"{', '.join(codec.map_names)}")  # fmt: skip
        self._codec = codec
        self.downsampling = codec.downsampling
        self.map_names = codec.map_names[:num_maps]
        self.map_scales = codec.map_scales(num_maps)
        """Side of each feature map over the latents' side."""

    def forward(self, latents_BCHW: Tensor) -> list[Tensor]:
        return self._codec.decode_features(latents_BCHW, len(self.map_names))

    def images(self, latents_BCHW: Tensor) -> Tensor:
        """Unclamped, about [-1, 1]; needs all maps."""
        assert len(self.map_names) == len(self._codec.map_names)
        return self._codec.decode(latents_BCHW)
