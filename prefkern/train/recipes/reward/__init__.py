"""Scores instead of logits (`--head reward`): a sequence-classification model through pair and list
losses."""
