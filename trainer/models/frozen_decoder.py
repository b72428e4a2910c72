"""The decoder of a frozen autoencoder as losses run it: features or images of latents, gradients to the latents alone."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.autoencoders import Codec, quantized
from trainer.models.frozen_layers import ALL_SAVINGS, FrozenConv, PhaseConv, Savings, as_it_is, frozen_chain

Window = tuple[Tensor, Tensor, int, int]
"""(top_B, left_B, height, width): each sample's part of the second feature map, in that map's pixels, all of one size;
where they begin is known on the host."""
WINDOWED = 1
"""Place of the map after which a window's part goes on alone: `up0` of Stable Diffusion's, `stage1` of a tiny one's."""


class FrozenDecoder(nn.Module):
    """Feature maps of scaled latents, in the order of `map_names`.

    A copy of a codec's decoder that computes the same with fewer operations and keeps less for the backward pass
    (`trainer.models.frozen_layers`); the codec stays as it is. It has a type of its own and computes in that, also under
    autocast. A codebook's codes are chosen in float32, whatever that type is.
    """

    codes_KC: Tensor | None

    def __init__(
        self,
        codec: Codec,
        num_maps: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        savings: Savings = ALL_SAVINGS,
    ) -> None:
        """
        Args:
            num_maps: run no deeper than this many maps, and hold no weights of what lies deeper; None: all of them, and
                what makes images of the last.
            dtype: of weights and activations; None: bfloat16 while on a GPU, where the codec is float32, else the
                codec's. Statistics of norms are float32 at least.

        Raises:
            UserError: the decoder has fewer maps.
        """
        super().__init__()
        if num_maps is not None and num_maps > len(codec.map_names):
            raise UserError(f"task.perceptual.num_maps: {num_maps}, but this decoder has {len(codec.map_names)} maps: "
                            f"{', '.join(codec.map_names)}")  # fmt: skip
        self.downsampling = codec.downsampling
        self.map_names = codec.map_names[:num_maps]
        self.map_scales = codec.map_scales(num_maps)
        """Side of each feature map over the latents' side."""
        self._scaled_to_raw = codec.scaling_factor, codec.shift_factor
        self._dtype, self._savings = dtype, savings
        codes_KC = codec.codes_KC
        self.register_buffer("codes_KC", None if codes_KC is None else codes_KC.detach().clone())
        stages = codec.decoder_stages()
        self.stages = nn.ModuleList(frozen_chain(stage, savings) for stage in stages[: len(self.map_names)])
        has_all = len(self.map_names) == len(stages)
        self.head = frozen_chain(codec.decoder_head(), savings) if has_all else None
        self.eval()
        self._choose_dtype()

    def forward(self, latents_BCHW: Tensor, window: Window | None = None, num_maps: int | None = None) -> list[Tensor]:
        """
        Args:
            num_maps: run no deeper than this many maps; None: as deep as it goes.
            window: compute the first two maps whole; then cut this part out of the second, each sample's its own, and
                run what lies deeper on that part alone, as if it were the whole map: norms see the part, and zeros lie
                beyond its border. Deeper maps that are returned are those of the part, the second one is whole.
        """
        with as_it_is(latents_BCHW):
            maps = []
            h = self._raw(latents_BCHW)
            for i, stage in enumerate(islice(self.stages, num_maps)):
                h = stage(h)
                maps.append(h)
                if i == WINDOWED and window is not None:
                    h = cut_out(h, window)
        return maps

    def images(self, latents_BCHW: Tensor) -> Tensor:
        """Unclamped, about [-1, 1]; needs all maps."""
        assert self.head is not None, f"only {', '.join(self.map_names)} are here"
        with as_it_is(latents_BCHW):
            h = self._raw(latents_BCHW)
            for stage in self.stages:
                h = stage(h)
            images_BCHW: Tensor = self.head(h)
        return images_BCHW

    def train(self, mode: bool = True) -> "FrozenDecoder":
        super().train(False)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(w.weight.dtype for w in self.modules() if isinstance(w, _MATRICES))

    def _raw(self, latents_BCHW: Tensor) -> Tensor:
        scale, shift = self._scaled_to_raw
        raw_BCHW = quantized(latents_BCHW / scale + shift, self.codes_KC).to(self.dtype)
        return raw_BCHW.contiguous(memory_format=torch.channels_last) if self._savings.channels_last else raw_BCHW

    def _apply(self, fn: Any, recurse: bool = True) -> "FrozenDecoder":  # behind `to`, `cuda`, `double`
        super()._apply(fn, recurse)
        self._choose_dtype()
        return self

    def _choose_dtype(self) -> None:
        """Of convolutions and matrix products; norms keep their weights as they are."""
        matrices = [module for module in self.modules() if isinstance(module, _MATRICES)]
        dtype = self._dtype
        if dtype is None and matrices[0].weight.is_cuda and matrices[0].weight.dtype == torch.float32:
            dtype = torch.bfloat16
        for module in matrices if dtype is not None else ():
            module.to(dtype)


_MATRICES = (FrozenConv, PhaseConv, nn.Conv2d, nn.Linear)


def cut_out(map_BCHW: Tensor, window: Window) -> Tensor:
    """Each sample's part of a map (B, C, height, width)."""
    top_B, left_B, height, width = window
    assert top_B.device.type == left_B.device.type == "cpu", "where a window begins would be waited for"
    places = zip(map_BCHW.unbind(), top_B.tolist(), left_B.tolist(), strict=True)
    parts = [map_CHW[:, top : top + height, left : left + width] for map_CHW, top, left in places]
    assert all(part.shape[1:] == (height, width) for part in parts), "a window reaches beyond the map"
    is_last = map_BCHW.is_contiguous(memory_format=torch.channels_last)
    return torch.stack(parts).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)
