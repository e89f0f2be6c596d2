"""Losses of single answers that are good or bad: (seq, *, desirable, ...) -> [S]."""
