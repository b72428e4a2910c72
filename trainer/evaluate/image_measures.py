"""Figures of generated images against real ones, from the rows of judges; each with its interval and how it was made."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.evaluate import metrics
from trainer.evaluate.judged_sets import Judged
from trainer.evaluate.metrics.bootstrap import Estimate, mean, normal_quantile

METRICS = {
    "fid": "Frechet distance of Gaussians that are fitted to features (Heusel et al. 2017)",
    "fid_infinity": "that distance extrapolated to endlessly many generated images (Chong and Forsyth 2020)",
    "kid": "kernel distance of random subsets (Binkowski et al. 2018)",
    "precision": "share of generated images among real ones, k = 3 (Kynkaanniemi et al. 2019)",
    "recall": "share of real images among generated ones, k = 3",
    "density": "real neighbourhoods that a generated image lies in, over k = 5 (Naeem et al. 2020)",
    "coverage": "share of real images with a generated one nearby, k = 5",
    "cmmd": "kernel distance of CLIP's embeddings (Jayasumana et al. 2024)",
    "clip_score": "100 cos of image and prompt by CLIP, as torchmetrics (Hessel et al. 2021)",
    "spectrum": "mean absolute difference of log10 power by frequency (Berrada et al. 2025, figure 5)",
}
OF_SPECTRUM = {
    "spectrum_low": "that difference over the lowest third of the frequencies",
    "spectrum_mid": "over the middle third",
    "spectrum_high": "over the highest third",
    "spectrum_high_signed": "mean difference over the highest third with its sign: below 0, detail is missing",
}
CLIP_S = "2.5 max(cos, 0) of image and prompt by CLIP (Hessel et al. 2021)"
OF_NETWORKS = ("fid", "fid_infinity", "kid", "precision", "recall", "density", "coverage")
OF_CLIP = ("cmmd", "clip_score")
DEFAULT = ("fid", "kid", "precision", "recall", "density", "coverage", "cmmd", "clip_score", "spectrum")
"""Those that can be had."""
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
NEIGHBOURS_OF = {
    "precision": NEIGHBOURS, "recall": NEIGHBOURS, "density": DENSITY_NEIGHBOURS, "coverage": DENSITY_NEIGHBOURS,
}  # fmt: skip
LEAST = 4
"""Images of a set, whatever is measured."""
KID_SUBSETS, KID_SIZE = 100, 1000
SPECTRUM_RESAMPLES = 200
CONFIDENCE = 0.95
FID_NETWORKS = {"inception": "", "inception_clean": "_clean"}
"""Whose Frechet distance is FID, or clean-fid's; that of others has their name."""
_OTHERS = {"fid": "fd", "fid_infinity": "fd_infinity", "kid": "kd"}
Figure = dict[str, Any]


def figure_name(metric: str, network: str) -> str:
    """`fid` of Inception alone: `fd_dinov2` of another."""
    if network in FID_NETWORKS:
        return metric + FID_NETWORKS[network]
    return f"{_OTHERS.get(metric, metric)}_{network}"


def check_counts(
    generated: int, real: int, dimensions: Mapping[str, int], wanted: Sequence[str], *, allow_few: bool,
    bias: Callable[[str, bool], float] | None = None,
) -> None:  # fmt: skip
    """Whether so many images can be compared.

    Args:
        dimensions: features, by network.
        allow_few: a Frechet distance of fewer images than features.
        bias: of a network's distance, given whether the generated images are no more than the real ones; where it is known.

    Raises:
        UserError: naming the metric and what it lacks.
    """
    least = min(generated, real)
    for network, d in dimensions.items():
        if {"fid", "fid_infinity"} & set(wanted) and least <= d and not allow_few:
            by = "" if bias is None else f", by some {bias(network, generated <= real):.3g} here"
            others = [
                name for name in wanted if name not in ("fid", "fid_infinity") and least > NEIGHBOURS_OF.get(name, 0)
            ]
            others = others or [name for name in OF_NETWORKS[2:] if least > NEIGHBOURS_OF.get(name, 0)]
            raise UserError(
                f"--metrics fid: {generated} generated and {real} real images for {d} features of {network}: with no more "
                f"images than features the distance is too large{by}; take {d + 1} or more, give --allow-few, or --metrics "
                f"{','.join(others)}"
            )
        for metric, k in NEIGHBOURS_OF.items():
            if metric in wanted and least <= k:
                raise UserError(f"--metrics {metric}: {generated} generated and {real} real images, and it looks at {k} "
                                "neighbours of each; take more images, or leave it out")  # fmt: skip
    if least < LEAST:
        raise UserError(
            f"{generated} generated and {real} real images are too few to compare; take hundreds, for FID thousands"
        )


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        generated, real: by judge; `pixels` always, `clip_prompts` of the generated ones where a CLIP score is wanted.
        networks: judges that give features, in the order in which they were named.
        allow_few: a Frechet distance of fewer images than features, which says little.
    """

    generated: Mapping[str, Judged]
    real: Mapping[str, Judged]
    networks: Sequence[str]
    resamples: int = 1000
    seed: int = 0
    allow_few: bool = False
    advance: Callable[[str], None] = lambda what: None

    def check(self, wanted: Sequence[str]) -> None:
        """Raises:
        UserError: as `check_counts`: known before anything slow is computed.
        """

        def bias(network: str, generated_is_smaller: bool) -> float:
            few = (self.generated if generated_is_smaller else self.real)[network]
            return metrics.frechet_bias(few.statistics("images"))

        for network in self.networks:
            made = self.generated[network]
            check_counts(
                len(made), len(self.real[network]), {network: made.features.shape[1]}, wanted, allow_few=self.allow_few,
                bias=bias,
            )  # fmt: skip

    def figures(self, wanted: Sequence[str]) -> dict[str, Figure]:
        """
        Raises:
            UserError: as `check`; or features that are not finite, or constant ones where a metric cannot take them.
        """
        self.check(wanted)
        found: dict[str, Figure] = {}
        for network in self.networks:
            for metric, figure in self._of_network(network, wanted):
                found[figure_name(metric, network)] = {"metric": metric, "network": network, **figure}
        if "cmmd" in wanted and "clip" in self.networks:
            self.advance("cmmd")
            fake, real = self.generated["clip"].features, self.real["clip"].features
            found["cmmd"] = {"metric": "cmmd", "network": "clip", "value": metrics.cmmd(fake, real), "interval": None}
        if "clip_prompts" in self.generated:
            found |= self._clip_score()
        if "spectrum" in wanted:
            self.advance("spectrum")
            found |= self._spectrum()
        return found

    def _of_network(self, network: str, wanted: Sequence[str]) -> "list[tuple[str, Figure]]":
        generated, real = self.generated[network], self.real[network]
        fake_ND, real_MD = generated.features, real.features
        metrics.check_pair("generated", fake_ND, "real", real_MD, at_least=2)
        found: list[tuple[str, Figure]] = []
        if "fid" in wanted or "fid_infinity" in wanted:
            statistics = real.statistics("real")
        if "fid" in wanted:
            self.advance(figure_name("fid", network))
            estimate = metrics.frechet_estimate(fake_ND, statistics, confidence=CONFIDENCE, allow_few=self.allow_few)
            bias = metrics.frechet_bias(generated.statistics("generated")) + metrics.frechet_bias(statistics)
            how = "delta method, over draws of the generated images"
            found.append(("fid", {**_estimated(estimate, how), "bias": bias}))
        if "fid_infinity" in wanted:
            self.advance(figure_name("fid_infinity", network))
            estimate = metrics.frechet_infinity(fake_ND, statistics, seed=self.seed, allow_few=self.allow_few)
            found.append(("fid_infinity", _estimated(estimate, "of the line's intercept and of the draw of images")))
        if "kid" in wanted:
            self.advance(figure_name("kid", network))
            found.append(("kid", _kid(fake_ND, real_MD)))
        neighbours = [name for name in ("precision", "recall", "density", "coverage") if name in wanted]
        if neighbours:
            self.advance(", ".join(figure_name(name, network) for name in neighbours))
            near = metrics.neighbourhoods(real_MD, fake_ND, k=NEIGHBOURS, density_k=DENSITY_NEIGHBOURS)
            rows = {
                "precision": near.precise_M, "recall": near.recalled_N, "density": near.density_M, "coverage": near.covered_N,
            }  # fmt: skip
            found += [(name, self._mean(rows[name])) for name in neighbours]
        return found

    def _mean(self, rows: NDArray[Any], function: Callable[[NDArray[Any]], float] = mean) -> Figure:
        if not self.resamples:
            return {"value": function(rows), "interval": None}
        estimate = metrics.bootstrap(function, rows, resamples=self.resamples, confidence=CONFIDENCE, seed=self.seed)
        return _estimated(estimate, f"bootstrap over images, {self.resamples} resamples")

    def _clip_score(self) -> dict[str, Figure]:
        self.advance("clip_score")
        image_ND, text_ND = self.generated["clip"].features, self.generated["clip_prompts"].features
        cosines_N = metrics.cosines(image_ND, text_ND)
        cut = int(self.generated["clip_prompts"].rows["cut"].sum())
        return {
            "clip_score": {
                "metric": "clip_score",
                "network": "clip",
                **self._mean(cosines_N, _hundredfold),
                "prompts_cut": cut,
            },
            "clip_s": {"metric": "clip_s", "network": "clip", **self._mean(metrics.clip_scores(image_ND, text_ND))},
        }

    def _spectrum(self) -> dict[str, Figure]:
        made_NF, real_NF = self.generated["pixels"].rows["power"], self.real["pixels"].rows["power"]
        names = list(metrics.spectrum_errors(metrics.log_power(made_NF), metrics.log_power(real_NF)))
        found = {}
        for name in names:

            def error(made: NDArray[Any], real: NDArray[Any], name: str = name) -> float:
                return metrics.spectrum_errors(metrics.log_power(made), metrics.log_power(real))[name]

            if self.resamples:
                count = min(self.resamples, SPECTRUM_RESAMPLES)
                is_signed = name.endswith("_signed")
                estimate = metrics.bootstrap(
                    error, made_NF, real_NF, resamples=count, confidence=CONFIDENCE, seed=self.seed, paired=False,
                    normal=not is_signed,
                )  # fmt: skip
                if not is_signed:
                    estimate = replace(estimate, low=max(estimate.low, 0.0))
                how = "percentiles" if is_signed else "standard errors"
                figure = _estimated(estimate, f"bootstrap over images of both sets, {how} of {count} resamples")
            else:
                figure = {"value": error(made_NF, real_NF), "interval": None}
            found[name] = {"metric": "spectrum", **figure}
        return found


def _hundredfold(cosines_N: NDArray[Any]) -> float:
    """As torchmetrics: `clip_score_100`."""
    return max(100.0 * mean(cosines_N), 0.0)


def _estimated(estimate: Estimate, how: str) -> Figure:
    return {
        "value": estimate.value,
        "interval": {"low": estimate.low, "high": estimate.high, "confidence": CONFIDENCE, "how": how},
    }


def _kid(fake_ND: NDArray[np.floating], real_MD: NDArray[np.floating]) -> Figure:
    least = min(len(fake_ND), len(real_MD))
    size = KID_SIZE if least >= 2 * KID_SIZE else least // 2
    value, deviation = metrics.kernel_distance_of_subsets(fake_ND, real_MD, subsets=KID_SUBSETS, size=size)
    # of subsets drawn without replacement (Politis and Romano 1994): a distance of all has size / least of their variance, and
    # subsets of a finite set vary by 1 - size / least less than fresh ones
    error = deviation * math.sqrt(size / (least - size))
    reach = normal_quantile(CONFIDENCE) * error
    figure = _estimated(Estimate(value, value - reach, value + reach), "by the deviation of the subsets")
    return {**figure, "subsets": KID_SUBSETS, "size": size, "deviation_of_a_subset": deviation}


def flat(figures: Mapping[str, Figure]) -> dict[str, float]:
    """Values alone."""
    return {name: figure["value"] for name, figure in figures.items()}


def in_words(name: str, figure: Figure, width: int = 0) -> str:
    """One line; `width`: of the longest name."""
    value, interval = figure["value"], figure["interval"]
    text = f"{name:<{width}}   {value:.4g}"
    if interval is not None:
        text += f"   [{interval['low']:.4g}, {interval['high']:.4g}]"
    if figure.get("bias"):
        text += f"   of which about {figure['bias']:.3g} is the bias of so few images"
    return text
