"""`einops.rearrange` where einops is not: diffusers does not bring it, and torch's own, in 2.13, breaks when imported twice."""

import math

from torch import Tensor


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """As einops has it, for named axes and groups of them in parentheses: `"b n (h d) -> b h n d", h=4`."""
    before, after = (_groups(side) for side in pattern.split("->"))
    assert len(before) == x.ndim, f"{pattern}: a tensor of {x.ndim} axes"
    for side, group in zip(x.shape, before, strict=True):
        known = math.prod(sizes[name] for name in group if name in sizes)
        for name in group:
            sizes.setdefault(name, side // known)  # one of a group alone may be open
        assert math.prod(sizes[name] for name in group) == side, f"{pattern}: {group} is not {side}"
    names = [name for group in before for name in group]
    order = [names.index(name) for group in after for name in group]
    apart = x.reshape([sizes[name] for name in names]).permute(order)
    return apart.reshape([math.prod(sizes[name] for name in group) for group in after])


def _groups(side: str) -> list[list[str]]:
    groups: list[list[str]] = []
    inside = False
    for word in side.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            groups.append([])
        elif word not in "()":
            if inside:
                groups[-1].append(word)
            else:
                groups.append([word])
        inside = word == "(" or (inside and word != ")")
    return groups
