"""Losses of a chosen and a rejected answer: (chosen, rejected, *, ...) -> [P]."""
