"""Liger's fused losses by their names: the same constructor, call and results, from prefkern.

    from prefkern.integrations.liger import LigerFusedLinearDPOLoss   # liger_kernel.chunked_loss
    from prefkern.integrations.liger import LigerFusedLinearCrossEntropyLoss

Liger itself is not needed. `compiled`, `chunk_size` and `accum_dtype` are accepted and change
nothing: tiles do not grow with the sequence, and gradients of weights are accumulated in fp32.
"""

from .cross_entropy import CrossEntropyOutput as CrossEntropyOutput
from .cross_entropy import LigerFusedLinearCrossEntropyLoss as LigerFusedLinearCrossEntropyLoss
from .preference import LigerFusedLinearCPOLoss as LigerFusedLinearCPOLoss
from .preference import LigerFusedLinearDPOLoss as LigerFusedLinearDPOLoss
from .preference import LigerFusedLinearKTOLoss as LigerFusedLinearKTOLoss
from .preference import LigerFusedLinearORPOLoss as LigerFusedLinearORPOLoss
from .preference import LigerFusedLinearSimPOLoss as LigerFusedLinearSimPOLoss
