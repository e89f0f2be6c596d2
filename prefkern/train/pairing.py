"""Checks of models before the first step: the head read right, batches packed or padded, two models
that can be compared. Each refuses with what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ..integrations import hf, packed_attention
from ..integrations.head import at_head
from ..integrations.output_layer import output_layer_of
from ..integrations.verify import verify_head
from . import models
from .config import TrainConfig
from .data import Example, collate
from .demands import ReferenceNeeds
from .forward import target_logps
from .sharded import Compute, called

# Packed and alone differ by rounding alone; a leak between sequences costs tenths of a nat.
PACKING_LIMIT = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@torch.no_grad()
def check_own_logits(
    model: hf.Model, config: TrainConfig, root: Compute = called, name: str | None = None
) -> float:
    """Largest difference in nats between log-probabilities at the head and by the own logits of
    `name` (default: the run's model).

    Raises:
        ValueError: a difference beyond rounding, logits that are not finite, no causal model.
    """
    verify = partial(verify_head, model, backend=config.backend, gathers=True)
    try:
        (difference,) = root(lambda: [verify()])  # in a list: ZeRO-3 looks for tensors in an output
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of the model's own code, of a compiler that it calls
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise ValueError(
            f"{name or config.model} ({type(hf.causal_lm(model)).__name__}) cannot read eight "
            f"tokens here: {type(error).__name__}: {reason}; another --attn-implementation, "
            "--backend or --device may (--debug shows where)."
        ) from error
    if difference is None:
        raise ValueError(
            f"the logits of {name or config.model} ({type(hf.causal_lm(model)).__name__}) are not "
            "finite on arbitrary tokens; check its weights."
        )
    return difference


@torch.no_grad()
def check_noise(
    policy: hf.Model, examples: list[Example], config: TrainConfig, root: Compute = called
) -> None:
    """Refuses a policy whose forward in training mode is not the one that it is evaluated with.

    Policy and reference would differ before the first step. Evaluated twice, it may itself differ
    by the noise of atomic sums. Dropout that was asked for is no such noise.
    """
    if not config.disable_dropout:
        return
    batch = collate(examples[:1], packed=False).to(next(policy.parameters()).device)
    training, found = policy.training, []
    for mode in (False, True):
        policy.train(mode)
        found.append(root(partial(target_logps, policy, batch, backend=config.backend)))
    policy.train(training)
    difference = (found[0] - found[1]).abs().max().item()
    if not difference <= PACKING_LIMIT[next(policy.parameters()).dtype]:
        raise ValueError(
            f"{type(hf.causal_lm(policy)).__name__} gives other log-probabilities in training mode "
            f"(by {difference:.3g} nats) though every dropout is off: it draws noise of its own, "
            "which policy and reference would not share; pass --no-disable-dropout to accept it."
        )


def packing_difference(
    model: hf.Model, examples: list[Example], config: TrainConfig, root: Compute = called
) -> float:
    """Largest difference in nats between packed log-probabilities and each sequence alone."""
    sequences = [s for e in examples[:2] for s in e.sequences][:4]
    alone = [Example(row=0, sequences=(s,)) for s in sequences]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def logps(examples: list[Example]) -> torch.Tensor:  # [n], scored rows
        batch = collate(examples, packed=True).to(device)
        found = root(partial(target_logps, model, batch, backend=config.backend))
        return found[batch.targets != -100]

    packed = logps(alone)
    single = torch.cat([logps([example]) for example in alone])
    model.train(was_training)
    return (packed - single).abs().max().item() if packed.numel() else 0.0


def choose_packing(
    say: Callable[[str], None],
    model: hf.Model,
    examples: list[Example],
    config: TrainConfig,
    root: Compute = called,
) -> bool:
    """Whether batches are packed; where that is wrong or wasteful they are padded, and said so."""
    if config.packing == "off":
        return False
    inner = hf.causal_lm(model)
    varlen = packed_attention.use(inner, config.max_length)
    attention = str(hf.text_config(model)._attn_implementation)
    limit = PACKING_LIMIT[next(model.parameters()).dtype]
    must = config.packing == "on" or config.token_budget is not None
    if hf.text_config(model) is not inner.config:
        reason = f"{type(inner).__name__} reads more than text"
    elif not hf.takes_position_ids(model):
        reason = f"{type(hf.backbone(model)).__name__} takes no position_ids"
    elif not (varlen or must or attention.startswith("flash") or attention == "flex_attention"):
        reason = (
            f"{attention} attention would mask a packed batch at the square of its total length"
        )
    elif (found := packing_difference(model, examples, config, root)) > limit:
        reason = (
            f"packed log-probabilities differ by {found:.3g} nats from each sequence alone "
            f"(limit {limit:g}, {attention} attention)"
        )
    else:
        return True
    if must:
        raise ValueError(
            f"batches cannot be packed: {reason}; use packing=off and no token_budget."
        )
    packed_attention.stop(inner)
    say(f"batches are padded, not packed: {reason}.")
    return False


def open_frozen(
    name: str,
    config: TrainConfig,
    examples: list[Example],
    packed: bool,
    policy: hf.Model,
    place: Callable[[hf.Model], hf.Model],
) -> hf.Model:
    """A further model without gradients, put where the policy is and checked like and beside it."""
    shares = getattr(hf.causal_lm(policy), "tp_size", None) or 1
    model = models.freeze(models.load_model(name, config, tensor_parallel=shares))
    at_head(model)
    model = place(model)
    check_own_logits(model, config, name=name)
    check_pairing(name, model, policy)
    check_tokens(name, config, examples)
    check_pictures(name, config)
    if packed:
        inner = hf.causal_lm(model)
        if hf.text_config(policy)._attn_implementation == packed_attention.NAME:
            packed_attention.use(inner, config.max_length)
        limit = PACKING_LIMIT[next(model.parameters()).dtype]
        if (found := packing_difference(model, examples, config)) > limit:
            raise ValueError(
                f"{name} cannot read packed batches (difference {found:.3g} nats); use packing=off."
            )
    return model


def check_tokens(name: str, config: TrainConfig, examples: list[Example]) -> None:
    """Refuses a model whose tokenizer has other tokens at the ids that the data hold; where whole
    distributions are compared or mixed, at any id but those of added tokens, of which a base model
    and its chat model have their own."""
    if name == config.model:
        return
    own = models.load_tokenizer(config.model)
    try:
        other = models.load_tokenizer(name)
    except ValueError:
        return  # a folder of weights alone: there is nothing to compare
    used = {int(i) for e in examples for s in e.sequences for i in s.input_ids}
    if ReferenceNeeds.of(config).distribution or config.generation_mixture:
        added = {int(i) for t in (own, other) for i in getattr(t, "added_tokens_decoder", ())}
        used |= set(range(min(len(own), len(other)))) - added
    every = sorted(used)
    mine, theirs = (t.convert_ids_to_tokens(every) for t in (own, other))
    for number, a, b in zip(every, mine, theirs, strict=True):
        if a != b:
            raise ValueError(
                f"the tokenizers of {config.model} and {name} differ: id {number} is {a!r} in the "
                f"one and {b!r} in the other; both models must read the same tokens."
            )


def check_pictures(name: str, config: TrainConfig) -> None:
    """Refuses a model whose processor makes other pixels of a picture than the policy's."""
    if config.image_column is None or name == config.model:
        return
    try:
        other = models.load_processor(name).image_processor.to_dict()
    except ValueError:
        return  # a folder of weights alone: there is nothing to compare
    own = models.load_processor(config.model).image_processor.to_dict()
    changed = sorted(k for k in {*own, *other} if own.get(k) != other.get(k))
    if changed:
        raise ValueError(
            f"the image processors of {config.model} and {name} differ in {', '.join(changed)}; "
            "both models must read the same pixels."
        )


def check_pairing(name: str, model: hf.Model, policy: hf.Model) -> None:
    """Refuses a model whose log-probabilities cannot be compared with the policy's."""
    own, other = (output_layer_of(m).vocabulary for m in (policy, model))
    if own != other:
        raise ValueError(
            f"{name} has a head of {other} entries, the policy's has {own}: their "
            "log-probabilities cannot be compared; both must share one vocabulary."
        )
