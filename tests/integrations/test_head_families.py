"""at_head: families that it does not know, and errors behind the head, told as they are."""

from __future__ import annotations

import pytest
import torch
from families import VOCAB, family_model
from head_batches import batch, fused_logps

from prefkern.integrations.head import at_head, ensure_head
from prefkern.integrations.head_view import guard
from prefkern.integrations.verify import verify_head


def altered(change):
    """A Llama whose forward passes through `change(self, forward, **kwargs)`."""
    model = family_model("llama")
    plain = type(model).forward

    class Altered(type(model)):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return change(self, lambda: plain(self, input_ids, attention_mask, **kwargs))

    model.__class__ = Altered
    return model


def times(factor):
    return lambda self, forward: scaled(forward(), factor)


def scaled(out, factor):
    out.logits = out.logits * factor
    return out


def clamped(self, forward):
    out = forward()
    out.logits = out.logits.clamp(-30, 30)
    return out


def biased(self, forward):
    out = forward()
    out.logits = out.logits + torch.arange(VOCAB) / VOCAB
    return out


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (times(1.001), r"turns the logits \[1.0"),
        (clamped, r"turns the logits \[1.0"),
        (biased, "more to its logits than its config says .*RuntimeError"),
        (lambda self, forward: (forward(), forward())[1], "output embedding more than once"),
        (lambda self, forward: self.model.norm(torch.ones(1, 2, 32)), "output embedding never"),
    ],
)
def test_a_family_that_treats_its_logits_otherwise_is_refused_on_the_first_call(change, match):
    model = altered(change)
    at_head(model)
    inputs, targets = batch()
    with pytest.raises(ValueError, match=match):
        model(**inputs, at_head=fused_logps(targets))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
        torch.distributed.DistBackendError("rank 1 is gone"),
    ],
)
def test_what_ends_a_forward_behind_the_head_is_told_as_it_is(error):
    def change(self, forward):
        forward()
        raise error

    model = altered(change)
    at_head(model)
    inputs, targets = batch()
    with pytest.raises(type(error)) as told:
        model(**inputs, at_head=fused_logps(targets))
    assert told.value is error


def test_a_family_that_was_tried_is_not_suspected_again():
    """The error of a later call is the caller's: a router mask of another shape, say."""
    calls = []

    def change(self, forward):
        out = forward()
        calls.append(1)
        if len(calls) > 1:
            raise IndexError("of the second call")
        return out

    model = altered(change)
    at_head(model)
    inputs, targets = batch()
    model(**inputs, at_head=fused_logps(targets))
    with pytest.raises(IndexError, match="of the second call"):
        model(**inputs, at_head=fused_logps(targets))


def test_ensure_head_tries_a_model_once():
    model = family_model("llama")
    with pytest.raises(ValueError, match=r"call at_head\(model\) before"):
        guard(model, None)
    ensure_head(model)
    ensure_head(model)
    assert model(**batch()[0], at_head=lambda view: view.hidden.sum()).value.isfinite()
    other = altered(lambda self, forward: scaled(forward(), 1.5))
    with pytest.raises(ValueError, match="turns the logits"):
        ensure_head(other)


def test_verification_sees_what_the_first_call_cannot():
    """A head whose own forward was patched: at_head runs in its place, so only the model's own
    logits can tell."""
    model = family_model("llama")
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden) * 1.01
    at_head(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*differ.*own logits"):
        verify_head(model)
