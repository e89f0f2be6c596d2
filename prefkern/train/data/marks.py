"""Special tokens that begin and end a text."""

from __future__ import annotations

from typing import Any


def holds_bos(tokenizer: Any, text: str) -> bool:
    """Whether a text begins with the BOS token itself."""
    bos: str = getattr(tokenizer, "bos_token", None) or ""
    return bos != "" and text.lstrip().startswith(bos)


def begun(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """The tokens of a text without the BOS that the tokenizer puts before one in the text."""
    doubled = ids.count(tokenizer.bos_token_id) > 1 if holds_bos(tokenizer, text) else False
    return ids[1:] if doubled and ids[0] == tokenizer.bos_token_id else ids


def end_marks(tokenizer: Any) -> tuple[str, ...]:
    """Special tokens by which a text may end a turn: all but those of beginning and padding."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if getattr(token, "special", False)}
    found |= set(getattr(tokenizer, "all_special_tokens", ()))
    names = ("bos_token", "pad_token", "unk_token", "mask_token")
    found -= {getattr(tokenizer, name, None) for name in names}
    found.add(getattr(tokenizer, "eos_token", None) or "")
    return tuple(sorted(mark for mark in found if mark))
