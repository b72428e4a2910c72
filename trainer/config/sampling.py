"""Which samplers there are, and what they go with."""

from typing import Literal, get_args

SamplerName = Literal["ddim", "dpm-solver", "euler", "heun", "rk4", "rk4-38"]
"""ddim (Song et al. 2021) for DDPM; dpm-solver (DPM-Solver++ 2M) for DDPM and flow; euler, heun (two network evaluations a
step), rk4 (four, the classic tableau) and rk4-38 (four, the 3/8 rule of torchdiffeq) for flow."""
SAMPLERS: tuple[str, ...] = get_args(SamplerName)
OF_DDPM = ("ddim", "dpm-solver")
OF_FLOW = ("euler", "heun", "rk4", "rk4-38", "dpm-solver")
MOST_DDPM_STEPS = 1000
"""The schedule's length."""


def samplers_of(paradigm: str) -> tuple[str, ...]:
    """Those that go with a paradigm's kind."""
    return OF_FLOW if paradigm == "flow" else OF_DDPM
