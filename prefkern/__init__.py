"""Preference-optimization losses from hidden states and the language-model head.

The [tokens, vocabulary] logits are never held: ops turn hidden states into a few numbers per token,
losses are pure functions of their sums. See `preference_loss` and `linear_logps`.
"""

from .backends.choice import use_backend
from .head import Head
from .losses import LOSSES
from .objective.preference_loss import PreferenceLoss, loss_from_stats, preference_loss
from .ops.error_sum import ErrorSums, error_sum
from .ops.linear_stats import linear_divergence, linear_logps
from .ops.list_rank import list_rank
from .ops.logits_logps import logits_logps, selective_log_softmax
from .ops.segment_sum import segment_sum
from .shard import Shard
from .stats import SeqStats, TokenStats

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "ErrorSums",
    "Head",
    "PreferenceLoss",
    "SeqStats",
    "Shard",
    "TokenStats",
    "__version__",
    "error_sum",
    "linear_divergence",
    "linear_logps",
    "list_rank",
    "logits_logps",
    "loss_from_stats",
    "preference_loss",
    "segment_sum",
    "selective_log_softmax",
    "use_backend",
]
