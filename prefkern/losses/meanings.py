"""What the arguments that many losses share mean, said once: name -> meaning.

A loss's docstring leaves such an argument out, or gives its own meaning instead. Defaults are added
from the signature, and what a record needs from its declaration (`docstrings.complete`).
"""

from __future__ import annotations

_TWO = "Statistics of the two answers, each field `[P]`"
_TWO_ERRORS = "`[P]` errors of the policy's predictions for the two images."
_REF_ERRORS = "`[P]` the reference's, same noise and timesteps. Constant."

# Records of statistics: the fields that a loss reads are added.
RECORDS: dict[str, str] = {
    "chosen": _TWO,
    "rejected": _TWO,
    "seq": "Statistics of the answers, each field `[S]`",
    "tokens": "Token statistics, each field `[N]`",
}

SCORES: dict[str, str] = {
    "logp": "`[S]` log-probability of each answer.",
    "logratio": "`[S]` log-ratio of each answer.",
    "mean_logp": "`[S]` mean log-probability per token of each answer.",
}

WITHOUT_REFERENCE: dict[str, str] = {"beta": "Scale of the margin, > 0."}

MEANINGS: dict[str, str] = {
    # data
    "relevance": "`[S]` numbers, higher is better; NaN leaves an answer out. Constant.",
    "cu_groups": "`[G+1]` boundaries of the lists, on the axis of the answers.",
    "cu_seqlens": "`[S+1]` boundaries of the sequences.",
    "scored": "`[N]` bool, True where a token counts.",
    "desirable": "`[S]` bool, True where the answer is desirable.",
    "gold": "Statistics of the best answer, each field `[P]`; only the likelihood term scores it.",
    "length": "`[S]` scored tokens of each answer; empty answers are left out. "
    "None: no answer is empty.",
    "logp": "`[S]` summed log-probability of each answer, for the likelihood term; not needed with "
    "sft_weight=0.",
    "old_logp": "`[N]` log-probabilities under the policy that sampled; None: the policy itself "
    "(r = 1).",
    "chosen_err": _TWO_ERRORS,
    "rejected_err": _TWO_ERRORS,
    "ref_chosen_err": _REF_ERRORS,
    "ref_rejected_err": _REF_ERRORS,
    "sigma": "Standard deviation of the transition at this step, > 0; a number or `[P]`.",
    # hyper-parameters
    "beta": "Strength of the pull to the reference, > 0.",
    "label_smoothing": "Probability eps in [0, 0.5] that a label is wrong.",
    "desirable_weight": "Factor of desirable answers, >= 0.",
    "undesirable_weight": "Factor of undesirable answers, >= 0.",
    "pair_reduction": '"sum" or "mean" over the strict pairs of a list.',
    "topk": "Number of ranks that count, an int or `[G]` integers >= 1; None: all.",
    "ties": 'Equal relevance: "strict" never compares tied answers (all equal gives 0), "breslow" '
    'lets each compete with all it is tied with, "stable" trains the stored order. With topk, '
    "strict and breslow keep a tied block whole.",
    "item_gain": '"none", or "exp2" to weigh each rank by 2^y - 1.',
    "link": '"sigmoid" or "hinge" (max(0, 1 - m)).',
    "backend": 'Of the list_rank op, "auto" or a name.',
}
