"""Preference data made from other preference data: small functions from table to table.

A table is a `datasets.Dataset` or any iterable of row mappings; a Dataset gives a Dataset, anything
else a list of dictionaries. Nothing here reads a model, and importing it does not import
`datasets`. Errors name row (from 0) and column.
"""

from .annotators import number_annotators, pairs_per_annotator, with_reliability
from .conditioning import (
    context_conditioned,
    control_prefix,
    direction_conditioned,
    direction_prompts,
    score_conditioned,
)
from .curriculum import curriculum, split_stages
from .mutual_ranking import mutual_scores, rank_by_run_time, rank_programs
from .pairs import drop_duplicates, pairs_from_judgements, pairs_from_lists
from .prompts import system_messages
from .rejection import rejection_sample, tournament_pairs
from .steps import divergence_weights, shared_steps_to_prompt, visit_labels
from .triples import triples_from_lists
from .weights import pair_weights, token_weights

__all__ = [
    "context_conditioned",
    "control_prefix",
    "curriculum",
    "direction_conditioned",
    "direction_prompts",
    "divergence_weights",
    "drop_duplicates",
    "mutual_scores",
    "number_annotators",
    "pair_weights",
    "pairs_from_judgements",
    "pairs_from_lists",
    "pairs_per_annotator",
    "rank_by_run_time",
    "rank_programs",
    "rejection_sample",
    "score_conditioned",
    "shared_steps_to_prompt",
    "split_stages",
    "system_messages",
    "token_weights",
    "tournament_pairs",
    "triples_from_lists",
    "visit_labels",
    "with_reliability",
]
