"""What makes a loss the method of its name, beyond the formula: where its inputs come from.

A loss that is fed otherwise would run and be another method, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from .batches import Batch, Pairs, Ranked, Side
from .noised import Inverted, Noised, Source

# Where the noisy inputs of a method come from, unless they come noisy.
SOURCE_OF = {"inpo": "inverted", "smpo": "renoised"}


def _reads(side: Side, reading: str) -> bool:
    return isinstance(side, Noised) and side.reading == reading


def _own_captions(batch: Batch, source: Source, segments: bool) -> str:
    if isinstance(batch, Pairs) and batch.rejected_cond is not None:
        return ""
    return "needs a caption of each side; pass rejected_cond= beside cond= in Pairs"


def _user(batch: Batch, source: Source, segments: bool) -> str:
    if isinstance(batch.cond, dict) and "user" in batch.cond:
        return ""
    return 'needs the user\'s embedding as an entry "user" of the dict cond'


def _inverted(batch: Batch, source: Source, segments: bool) -> str:
    ready = all(isinstance(side, Noised) for side, *_ in batch.parts())
    if ready or not _is_forward(source):
        return ""
    return 'needs inverted inputs; leave source out, or pass source="inverted" or "renoised"'


def _own_negative(batch: Batch, source: Source, segments: bool) -> str:
    if isinstance(batch, Pairs) and _reads(batch.rejected, "prediction"):
        return ""
    return "needs the policy's own samples as the rejected side; make it with diffusion.own_noised"


def _transitions(batch: Batch, source: Source, segments: bool) -> str:
    if isinstance(batch, Pairs) and _reads(batch.chosen, "mean"):
        return ""
    return "compares sampling steps; make its pairs with diffusion.step_pairs or diffusion.branches"


def _truncated(batch: Batch, source: Source, segments: bool) -> str:
    (side, *_), *others = batch.parts()
    if not others and _reads(side, "clean"):
        return ""
    return "regresses on samples cut short; make them with diffusion.truncated"


def _segments(batch: Batch, source: Source, segments: bool) -> str:
    return "" if segments else "needs segments=, num_segments= and segment_dim= of its samples"


def _ranked(batch: Batch, source: Source, segments: bool) -> str:
    return "" if isinstance(batch, Ranked) else "ranks groups of samples; pass a Ranked batch"


def _elsewhere(batch: Batch, source: Source, segments: bool) -> str:
    return (
        "is no loss of one denoiser on a batch of samples; call it on errors of your own "
        "(prefkern.error_sum)"
    )


# loss -> what it lacks to be the method, "" where nothing
NEEDS: dict[str, Callable[[Batch, Source, bool], str]] = {
    "d3po": _transitions,
    "dcpo": _own_captions,
    "dense_dpo": _segments,
    "diff_instruct_star": _elsewhere,
    "dro": _own_negative,
    "inpo": _inverted,
    "lpo": _ranked,
    "ppd": _user,
    "rank_dpo": _ranked,
    "self_npo": _truncated,
    "smpo": _inverted,
    "spo_step": _transitions,
    "tlpo": _elsewhere,
}


def check(loss: str, batch: Batch, source: Source, segments: bool) -> None:
    """Refuses a batch that would make the loss another method than its name says.

    Raises:
        ValueError: what is missing.
    """
    lacks = NEEDS[loss](batch, source, segments) if loss in NEEDS else ""
    if lacks:
        raise ValueError(f"loss {loss!r} {lacks}.")


def _is_forward(source: Source) -> bool:
    return not isinstance(source, Inverted) and getattr(source, "__name__", "") == "forward"
