"""verl's log-probabilities and entropy at the head, for use_fused_kernels.

    from prefkern.integrations import verl
    verl.use()                           # in every worker, before its model is built

Read: 0.9.1. verl's forward imports FusedLinearForPPO when it is called; this stands in its place
for the backends "torch" and "liger" alike.

Shapes: N tokens or [B, T], D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..head import Head
from ..ops.linear_stats import linear_logps
from . import signatures

TESTED = "verl 0.9.1"
MODULE = "verl.utils.experimental.torch_functional"
_INIT = ("self", "chunk_size", "impl_backend")
_FORWARD = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")


class FusedLinearForPPO(nn.Module):
    """(log_probs, entropy) of shifted labels; `chunk_size` and `impl_backend` change nothing.

    Both are fp32 (fp64 for fp64 input), and both carry a gradient where grad is on; verl returns
    the entropy in the dtype of the hidden states.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self,
        hidden_states: Tensor,  # [N, D] or [B, T, D]
        vocab_weights: Tensor,  # [V, D]
        input_ids: Tensor,  # [N] or [B, T]
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        head = Head(vocab_weights, temperature=temperature)
        targets = input_ids.to(torch.int64)
        tokens = linear_logps(hidden_states, head, targets, stats=("logp", "ent"))
        assert tokens.logp is not None and tokens.ent is not None
        return tokens.logp, tokens.ent


def use() -> None:
    """Puts this class in the place of verl's.

    Raises:
        ImportError: verl is absent, or its class is not the one that was read.
    """
    own = signatures.imported(f"{MODULE}:FusedLinearForPPO", TESTED)
    if own is FusedLinearForPPO:
        return
    signatures.check(own.__init__, _INIT, TESTED)
    signatures.check(own.forward, _FORWARD, TESTED)
    module = signatures.imported("verl.utils.experimental:torch_functional", TESTED)
    module.FusedLinearForPPO = FusedLinearForPPO
