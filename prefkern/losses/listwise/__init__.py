"""Losses of ranked lists: (scores, labels, cu_groups, *, ...) -> [G]."""
