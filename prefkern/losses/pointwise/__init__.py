"""Losses of single answers with a good/bad label: (seq, *, label, ...) -> [S]."""
