"""Ways to pay less for the latent perceptual loss by estimating it: fewer samples, a part of each image, a lighter decoder.

Choosing samples is unbiased, and adds least where the first maps of all samples foretell what deeper ones of the others
would give. A window and another decoder are biased; `ops/bench/lpl_estimators.py` measures by how much, and
what each adds to the variance of the whole gradient. Shapes: N gated samples, K bins of noise levels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor, nn

from trainer.config import CropConfig, LPLConfig, SampledConfig
from trainer.diffusion.paradigms import Paradigm
from trainer.errors import UserError
from trainer.losses.gate import inside, training_levels
from trainer.losses.injection import to_device
from trainer.losses.perceptual import PerceptualContext
from trainer.models.autoencoders import Codec
from trainer.models.frozen_decoder import WINDOWED, FrozenDecoder, Window
from trainer.readback import Readback


def check_estimators(config: LPLConfig, used: Sequence[str], is_deep: Sequence[bool], map_names: Sequence[str]) -> None:
    """Raises:
    UserError: the decoder does not go so deep that there is something to estimate.
    """
    names = ", ".join(map_names)
    if config.sampled and config.sampled.whole_maps and len(set(is_deep)) < 2:
        raise UserError(f"task.perceptual.sampled.whole_maps: {config.sampled.whole_maps}, with {', '.join(used)} used of "
                        f"this decoder's {names}; both the first so many and what lies deeper must be used")  # fmt: skip
    if config.crop and map_names.index(used[-1]) <= WINDOWED:
        raise UserError(f"task.perceptual.crop: the decoder runs no deeper than {used[-1]}, and only what lies deeper than "
                        f"{map_names[min(WINDOWED, len(map_names) - 1)]} is decoded in part; leave it out")  # fmt: skip


# ------------------------------------------------------------------------------------------------------- fewer samples

MEMORY_STEPS = 100
"""The running sums forget a step's losses by 1/e in so many steps."""
PRIOR_SAMPLES = 4.0
"""A bin's RMS is that of its samples and of so many at the mean of all bins: a bin that has seen little or nothing is taken
for an ordinary one, and no probability becomes tiny by an accident of few samples."""
CERTAIN = 1.0 - 1e-9
SMALLEST_SHARE = 1e-6
"""Of the largest size, that a sample's is taken for at least: every sample can be chosen."""


@dataclass(frozen=True)
class Choice:
    """Which of a micro-batch's gated samples are decoded to the end; all on the host."""

    rows: Tensor
    others: Tensor
    """Rows of the gated samples that are not: only their whole maps are there."""
    weight_N: Tensor
    """One over the probability with which each of `rows` was chosen."""
    foretold: float
    """What the loss of the deeper maps is taken to be where it is not known, as a multiple of the whole maps' loss. Any
    number that does not depend on the choice leaves the mean as it is; a good one leaves little to be estimated."""

    def map_factors(self, size: int, is_deep: Sequence[bool]) -> Tensor:
        """Factors (size, maps), float32, on each sample's and map's loss, with which the sum over all samples has that of the
        gated ones' losses as its mean. With S a sample's loss over whole maps, D over deeper ones, b `foretold` and w the
        weight: S + b S for those not chosen, and that + w (D - b S) for the chosen."""
        whole_B, deep_B = torch.zeros(2, size, dtype=torch.float64)
        whole_B[self.others] = 1.0 + self.foretold
        whole_B[self.rows] = 1.0 + self.foretold - self.weight_N * self.foretold
        deep_B[self.rows] = self.weight_N
        return torch.stack([deep_B if deep else whole_B for deep in is_deep], -1).float()


class GatedSampler(nn.Module):
    """Chooses so many of a micro-batch's gated samples, likelier where there has been much to estimate.

    The choice is made on the host. What a step's losses were arrives there while the next one runs, so a step's choice
    follows from the losses up to two steps before. Both states that a later choice needs are in the checkpoint: a run that
    was resumed chooses what an undisturbed one would have.
    """

    def __init__(self, config: SampledConfig) -> None:
        super().__init__()
        self.config = config
        self.states: Tensor
        """(2, K, 4): before the last step and after it, each bin's fading sums over chosen samples of weight, and of weight
        times D^2, D S and S^2: D and S as in `Choice.map_factors`."""
        self.of_step: Tensor
        """(K, 4): the same sums of this step, of this rank."""
        self.register_buffer("states", torch.zeros(2, config.num_bins, 4, dtype=torch.float64))
        self.register_buffer("of_step", torch.zeros(config.num_bins, 4, dtype=torch.float64))
        self._arrived: Readback | None = None
        """The state that this step's choices follow from. None: to be read from the device, once."""
        self._arriving: Readback | None = None
        self._edges: tuple[tuple[Paradigm, float], Tensor] | None = None

    def choose(self, noise_level_B: Tensor, context: PerceptualContext) -> Choice:
        """min(samples_per_rank, num gated) of the gated samples; rows in ascending order."""
        gated = inside(noise_level_B, context.threshold)
        count = self.config.samples_per_rank
        if len(gated) <= count:
            return Choice(gated, gated[:0], torch.ones(len(gated), dtype=torch.float64), foretold=0.0)
        size_K, foretold = sizes(self._sums())
        # In the order of their levels, the chosen are spread evenly over them: neighbours have similar losses.
        gated = gated[noise_level_B[gated].argsort(stable=True)]
        probability_N = inclusion_probabilities(size_K[self._bins(noise_level_B[gated], context)], count)
        # one number of the micro-batch's, that of its first sample
        chosen = systematic_choice(probability_N, context.uniform("estimator")[0].item())
        rows, order = gated[chosen].sort()
        is_other = torch.ones(len(gated), dtype=torch.bool).index_fill(0, chosen, False)
        return Choice(rows, gated[is_other].sort().values, 1.0 / probability_N[chosen][order], foretold)

    def record(
        self, choice: Choice, deep_B: Tensor, whole_B: Tensor, noise_level_B: Tensor, context: PerceptualContext
    ) -> None:
        """For later choices: losses over deeper maps and over whole maps, on the device, of the chosen rows at least."""
        rows = choice.rows
        if not len(rows):
            return
        bins_N = self._bins(noise_level_B[rows], context)
        # As a matrix made on the host: adding by index would round in another order each time on a GPU.
        weight_KN = torch.zeros(self.config.num_bins, len(rows), dtype=torch.float64)
        weight_KN[bins_N, torch.arange(len(rows))] = choice.weight_N
        on_device = to_device(torch.cat([rows[None], weight_KN]), self.of_step.device)
        rows, weight_KN = on_device[0].long(), on_device[1:]
        deep_N, whole_N = deep_B.detach().double()[rows], whole_B.detach().double()[rows]
        products_N4 = torch.stack([torch.ones_like(deep_N), deep_N**2, deep_N * whole_N, whole_N**2], -1)
        self.of_step += (weight_KN[..., None] * products_N4).sum(1)

    def end_step(self, keep: Tensor) -> None:
        """A collective. Takes the step's losses into the running sums, unless the step was refused."""
        if dist.is_initialized():
            dist.all_reduce(self.of_step)
        kept = (keep > 0) & self.of_step.isfinite().all()
        before, after = self.states
        before.copy_(after)
        after.copy_(torch.where(kept, after * math.exp(-1 / MEMORY_STEPS) + self.of_step, after))
        self.of_step.zero_()
        if self._arriving is not None:
            self._arrived, self._arriving = self._arriving, Readback(after)

    def state_tensors(self) -> dict[str, Tensor]:
        """Whoever takes them may write into them, so the host reads its copy anew before it chooses again."""
        self._arrived = self._arriving = None
        return {"sampled": self.states}

    def _sums(self) -> Tensor:
        """(K, 4), as they were two steps ago."""
        if self._arrived is None:
            self._arrived, self._arriving = (Readback(state) for state in self.states)
        return torch.tensor(self._arrived.read(), dtype=torch.float64).view(-1, 4)

    def _bins(self, noise_level_N: Tensor, context: PerceptualContext) -> Tensor:
        key = (context.paradigm, context.threshold)
        if self._edges is None or self._edges[0] != key:
            self._edges = key, level_quantiles(*key, self.config.num_bins)
        return torch.bucketize(noise_level_N.double(), self._edges[1])


def sizes(sums_K4: Tensor) -> tuple[Tensor, float]:
    """Root mean square (K,) of what is to be estimated in each bin, D - b S; and b, which makes it the least over all bins."""
    count_K, deep_K, both_K, whole_K = sums_K4.unbind(-1)
    foretold = both_K.sum().item() / whole_K.sum().item() if whole_K.sum() > 0 else 0.0
    squares_K = (deep_K - 2 * foretold * both_K + foretold**2 * whole_K).clamp(min=0.0)
    if not squares_K.sum() > 0:
        return torch.ones_like(count_K), foretold
    mean = squares_K.sum() / count_K.sum()
    return ((squares_K + PRIOR_SAMPLES * mean) / (count_K + PRIOR_SAMPLES)).sqrt(), foretold


def level_quantiles(paradigm: Paradigm, threshold: float, num_bins: int) -> Tensor:
    """Edges (num_bins - 1,) between bins of noise levels inside the gate, float64: training fills the bins evenly."""
    level = training_levels(paradigm)
    level = level[level <= threshold]
    if not len(level):
        return torch.full((num_bins - 1,), math.inf, dtype=torch.float64)
    return level.quantile(torch.arange(1, num_bins, dtype=torch.float64) / num_bins)


def inclusion_probabilities(size_N: Tensor, count: int) -> Tensor:
    """min(1, c * size) with the c at which they sum to `count`, of which there are fewer than N. Sizes are positive."""
    assert count < len(size_N), f"{count} of {len(size_N)}"
    size_N = size_N.double().clamp(min=SMALLEST_SHARE * size_N.max().item())
    certain_N = torch.zeros(len(size_N), dtype=torch.bool)
    while True:
        scale = (count - int(certain_N.sum())) / size_N[~certain_N].sum()
        probability_N = (scale * size_N).masked_fill(certain_N, 1.0)
        # what is within rounding of certain is certain: the others must be less than one apart from each other
        over_N = ~certain_N & (probability_N >= CERTAIN)
        if not over_N.any():
            return probability_N
        certain_N |= over_N


def systematic_choice(probability_N: Tensor, uniform: float) -> Tensor:
    """Places chosen with these probabilities, without replacement, as many as the probabilities' sum, which is whole.

    Madow's systematic sampling: laid end to end on a line, those that hold `uniform`, `uniform` + 1, ... Those that
    are certain are taken out first, so that rounding takes none of them twice.
    """
    certain = (probability_N >= CERTAIN).nonzero().flatten()
    others = (probability_N < CERTAIN).nonzero().flatten()
    if not len(others):
        return certain
    end_N = probability_N[others].cumsum(0)
    count = round(end_N[-1].item())
    points = uniform + torch.arange(count, dtype=torch.float64)
    places = torch.searchsorted(end_N * (count / end_N[-1]), points, right=True).clamp(max=len(others) - 1)
    return torch.cat([certain, others[places]])


# --------------------------------------------------------------------------------------------------- a part of each image


def window_size(height: int, width: int, area: float) -> tuple[int, int]:
    """Of the windows that tile a map and whose share of it is the nearest to `area`, the squarest; never the whole.

    Tiles, and not windows at any place: each pixel is then seen equally often, where a free window sees a border's pixels
    more seldom than those within.
    """
    sizes = [
        (height // rows, width // columns)
        for rows in range(1, height + 1)
        for columns in range(1, width + 1)
        if height % rows == 0 and width % columns == 0 and rows * columns > 1
    ]
    assert sizes, f"a map of {height}x{width} has no parts"

    def unfit(size: tuple[int, int]) -> tuple[float, float]:
        h, w = size
        return abs(math.log(h * w / (area * height * width))), abs(math.log(h / w))

    return min(sizes, key=unfit)


def check_window(resolution: int, cut_side: int, scale: int, smallest: int, name: str, config: CropConfig) -> None:
    """
    Args:
        cut_side: of the map out of which windows are cut, in pixels.
        scale: of map `name`, over that one's.
        smallest: side that is needed in `name`.

    Raises:
        UserError: the window's part has fewer pixels a side.
    """
    window = min(window_size(cut_side, cut_side, config.area)) * scale
    if window < smallest:
        raise UserError(f"resolution {resolution}: the part of the decoder's map {name} that task.perceptual.crop leaves has "
                        f"{window} pixels a side, fewer than the {smallest} that are needed; train larger images, set a "
                        "larger area, or leave crop out")  # fmt: skip


def draw_windows(uniform_B: Tensor, height: int, width: int, config: CropConfig) -> Window:
    """Each sample's window in a map of this size, on the host; all tiles are as likely."""
    h, w = window_size(height, width, config.area)
    columns = width // w
    # The lower half of the draw's bits: the upper one chooses samples, which must not depend on where their windows are.
    fine_B = (uniform_B.double() * 2.0**26).frac()
    tile_B = (fine_B * (height // h * columns)).long()
    return tile_B // columns * h, tile_B % columns * w, h, w


# ----------------------------------------------------------------------------------------------------- a lighter decoder


class LightDecoder(FrozenDecoder):
    """Features of `codec`'s scaled latents by the decoder of another autoencoder that shares its latent space."""

    def __init__(self, codec: Codec, light: Codec, num_maps: int | None = None) -> None:
        super().__init__(light, num_maps)
        self._scale, self._shift = shared_latents(codec, light)

    def forward(self, latents_BCHW: Tensor, window: Window | None = None, num_maps: int | None = None) -> list[Tensor]:
        return super().forward(latents_BCHW * self._scale + self._shift, window, num_maps)


def shared_latents(codec: Codec, light: Codec) -> tuple[float, float]:
    """(scale, shift) that take `codec`'s scaled latents to `light`'s.

    Two of a kind share their raw latents. What a tiny autoencoder calls raw is what the large one that it was distilled
    from calls scaled.
    """
    own_is_tiny, is_tiny = (isinstance(c.vae, AutoencoderTiny) for c in (codec, light))
    if is_tiny and not own_is_tiny:
        return light.scaling_factor, -light.shift_factor * light.scaling_factor
    if own_is_tiny and not is_tiny:
        return 1.0 / codec.scaling_factor, codec.shift_factor
    scale = light.scaling_factor / codec.scaling_factor
    return scale, (codec.shift_factor - light.shift_factor) * light.scaling_factor


def load_light(url: str, codec: Codec) -> Codec:
    """The autoencoder at `url`, in place of `codec`'s decoder.

    Raises:
        UserError: as `Codec.load`; or its latents have other channels or another size.
    """
    field = "task.perceptual.decoder_url"
    try:
        light = Codec.load(url)
    except UserError as e:
        raise UserError(f"{field}: {e}") from None
    for what, own, found in (
        ("channels", codec.latent_channels, light.latent_channels),
        ("times downsampling", codec.downsampling, light.downsampling),
    ):
        if own != found:
            raise UserError(f"{field}: the autoencoder at {url} has latents of {found} {what}, the codec's have {own}; "
                            "give one that shares the codec's latent space, or leave it out")  # fmt: skip
    return light
