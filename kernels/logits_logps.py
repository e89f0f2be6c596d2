"""logits_logps: the folds and gradients of the head ops on logits that exist already."""

from __future__ import annotations

import functools

from prefkern.backends.tiled import logits

from .epilogue import KERNELS

logits_logps_fwd = functools.partial(logits.logits_logps_fwd, KERNELS)
logits_logps_bwd = functools.partial(logits.logits_logps_bwd, KERNELS)
