"""MaPO for diffusion models: preference and likelihood without a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import checks
from .. import core, links
from ..declare import diffusion
from . import errors

SERIES_BELOW = 1e-2  # there the series is exact to 3e-17, and x / (e^x - 1) starts to lose digits


def link(x: Tensor) -> Tensor:
    """f(x) = x / (e^x - 1) for x >= 0, f(0) = 1, formed as x e^-x / (1 - e^-x) so that no large x
    overflows; its derivative at 0 is -1/2."""
    near = x < SERIES_BELOW
    small = torch.where(near, x, 0.0)
    square = small * small
    series = 1.0 - small / 2 + square / 12 - square * square / 720
    large = torch.where(near, 1.0, x)
    return torch.where(near, series, large * torch.exp(-large) / -torch.expm1(-large))


@diffusion(source="arXiv 2406.06424", status="executed against the authors' code")
def diffusion_mapo(
    chosen_err: Tensor,  # [P]
    rejected_err: Tensor,  # [P]
    *,
    snr: float = 0.5,
    T: float = 1000.0,
    beta_mapo: float = 0.1,
) -> Tensor:  # [P]
    """MaPO: the chosen image's error plus a margin between the likelihood links of the two.

    l = e_w + beta_mapo softplus(-T (f(snr e_w) - f(snr e_l))),  f(x) = x / (e^x - 1)

    arXiv 2406.06424, as in the authors' code; version 2 of the paper writes other
    hyper-parameters, and its printed gradient is not the derivative of its link. Errors are means.
    Not the token loss `mapo` of SparsePO.

    Args:
        snr: Scale of the error inside the link, > 0.
        T: Scale of the margin, the number of training timesteps, > 0.
        beta_mapo: Weight of the margin term, >= 0.

    Returns:
        Unreduced loss `[P]`; it contains the supervised term e_w.
    """
    core.positive("snr", snr)
    core.positive("T", T)
    core.not_negative("beta_mapo", beta_mapo)
    for name, err in (("chosen_err", chosen_err), ("rejected_err", rejected_err)):
        checks.check_float(name, err)
        errors.one_per_sample(name, err)
    margin = T * core.difference(link(snr * chosen_err), link(snr * rejected_err))
    return chosen_err + links.logistic(margin, beta_mapo)
