"""Losses that are not linear in the tokens: (tokens, cu_seqlens, *, ...) -> [S] or [N]."""
