"""Losses of ranked lists: (scores, relevance, cu_groups, *, ...) -> [G]."""
