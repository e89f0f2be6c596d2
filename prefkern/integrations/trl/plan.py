"""What a trainer's loss_type, loss_args and configuration ask for, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ... import losses
from ...losses import inline
from ...losses.record import Loss
from ...stats import ONE_MODEL_STATS, SeqStats
from ...train.recipes.states import rule_of

# Loss types whose formula is TRL's own, by trainer.
DPO_TYPES = frozenset({
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
})  # fmt: skip
# Those of DPO whose tensor TRL's use_weighting cannot multiply in place.
_UNWEIGHTED = frozenset({"hinge", "sft"})
KTO_TYPES = frozenset({"kto", "apo_zero_unpaired"})
# Configuration fields that are arguments of losses: ours by the name of TRL's.
_SHARED = {"beta": "beta", "label_smoothing": "label_smoothing", "discopop_tau": "tau"}
# Those that only TRL's formulas know: what to write instead.
_TRL_ONLY = {
    "f_divergence_type": 'loss_type="fdpo" with loss_args={"divergence": ...}',
    "f_alpha_divergence_coef": 'loss_type="fdpo" with loss_args={"divergence": "alpha", ...}',
    "use_weighting": 'loss_type="wpo"',
    "ld_alpha": 'loss_type="ld_dpo" with loss_args={"alpha": ...}',
    "desirable_weight": "loss_args",
    "undesirable_weight": "loss_args",
}
# Arguments of a loss that a trainer has no source for.
_NO_SOURCE = {
    "activations": "hidden states of single blocks",
    "hook_type": "hidden states of single blocks",
    "pairs": "positions of answers in the batch",
    "source": "answers of several judges",
    "source_weights": "answers of several judges",
}
MASKS = frozenset({"reward_mask", "kl_mask"})
# Loss arguments that configure the masks; the loss itself knows the last one alone.
MASK_OPTIONS = ("mask_on_reward", "mask_on_kl", "rw_kl_independent")


@dataclass(frozen=True)
class Needs:
    """What the losses of a run read."""

    logp: bool  # the reference's log-probabilities
    distribution: bool  # its whole distribution
    tokens: bool  # it by the token
    masks: bool  # hidden states after its blocks, for learned masks
    aux: str  # of a third model: "", "logp" or "head"
    columns: tuple[str, ...]  # arguments that stand in the data set
    lists: bool  # ranked lists
    roles: tuple[str, ...]  # answers of a pair's group

    @property
    def reference(self) -> bool:
        return self.logp or self.distribution


@dataclass(frozen=True)
class LossPlan:
    """The losses of a run: what preference_loss is called with."""

    names: list[str]  # with the arguments of each behind it
    weights: list[float]
    args: dict[str, Any]  # loss_args, for all of them
    records: tuple[Loss, ...]
    hyper: tuple[dict[str, Any], ...]  # hyper-parameters of each
    needs: Needs
    columns: dict[str, str]  # argument -> column of the data set
    mask_options: dict[str, Any]
    loss_args: dict[str, Any]  # as they were given

    @property
    def betas(self) -> dict[str, float]:
        """The beta of every loss that has one, under the name it is logged with."""
        alone = len(self.records) == 1
        return {
            "beta" if alone else f"beta/{record.name}": float(hyper["beta"])
            for record, hyper in zip(self.records, self.hyper, strict=True)
            if isinstance(hyper.get("beta"), int | float)
        }


def plan_of(
    config: Any, families: Sequence[str], trl_types: frozenset[str], *, aux_model: bool
) -> LossPlan | None:
    """The plan of a configuration; None where the formulas are TRL's.

    Args:
        config: A DPOConfig or KTOConfig, TRL's or ours.
        families: The families of losses that the trainer has data for.
        trl_types: The loss types that are TRL's own in this trainer.
        aux_model: Whether a third model was given.

    Raises:
        ValueError: an unknown loss (nearest names) or argument, arguments of TRL that a loss cannot
            honour, a loss whose tensors this trainer has no source for.
    """
    given = _names(config.loss_type)
    args = _mapping(config, "loss_args")
    columns = _mapping(config, "loss_columns")
    if wrong := [v for v in columns.values() if not isinstance(v, str)]:
        raise ValueError(f"loss_columns maps arguments to names of columns, got {wrong[0]!r}.")
    if set(given) <= trl_types and not args and not columns:
        if aux_model:
            raise ValueError(f"aux_model serves losses that read a third model, got {given}.")
        if getattr(config, "use_weighting", False) and (unfit := _UNWEIGHTED.intersection(given)):
            raise ValueError(
                f"use_weighting multiplies losses in place, which TRL's {', '.join(sorted(unfit))} "
                'does not bear (its first step raises); drop one of them, or use loss_type="wpo".'
            )
        return None
    resolved = [losses.resolve(name) for name in given]
    records = tuple(record for record, _ in resolved)
    _check_families(records, families)
    mask_options = {k: args[k] for k in MASK_OPTIONS if k in args and _has_masks(records)}
    loss_args = dict(args)
    for name in {*mask_options}.intersection(MASK_OPTIONS[:2]) | state_options(records):
        args.pop(name, None)
    losses.check_arguments(records, args)
    names, calls = [], []
    taken: set[str] = set()
    for name, (record, own) in zip(given, resolved, strict=True):
        known = losses.arguments(record)
        bare = inline.split(name)
        named = bare[0] in trl_types
        more = _from_config(config, bare[0], known, {*own, *args}, named=named)
        taken |= {*more, *(k for k in _SHARED.values() if k in {*own, *args})}
        names.append(inline.join(bare[0], {**more, **bare[1]}))
        bound = {**{k: v for k, v in args.items() if k in known}, **more, **own}
        supplied = (*losses.required(record), "desirable")
        calls.append(losses.bind(record, bound, supplied=supplied))
    _check_config(config, given, taken)
    needs = _needs(records, calls, args, columns, aux_model=aux_model)
    weights = getattr(config, "loss_weights", None) or [1.0] * len(names)
    if not all(isinstance(w, int | float) and math.isfinite(w) for w in weights):
        raise ValueError(f"loss_weights must be finite numbers, got {list(weights)}.")
    order = _order(calls)
    return LossPlan(
        [names[i] for i in order], [float(weights[i]) for i in order], args,
        tuple(records[i] for i in order), tuple(calls[i].hyper for i in order), needs, columns,
        mask_options, loss_args,
    )  # fmt: skip


def _names(loss_type: Any) -> list[str]:
    found = [loss_type] if isinstance(loss_type, str) else loss_type
    if isinstance(found, list | tuple) and found and all(isinstance(n, str) for n in found):
        return list(found)
    raise ValueError(
        f"loss_type must be the name of a loss or a list of names, got {loss_type!r}; the names "
        "are TRL's types and those of prefkern.LOSSES."
    )


def _mapping(config: Any, field: str) -> dict[str, Any]:
    found = getattr(config, field, None)
    if found is None:
        return {}
    if isinstance(found, Mapping) and all(isinstance(name, str) for name in found):
        return dict(found)
    raise ValueError(
        f'{field} must be a mapping of names, {{"alpha": 0.5}} (as JSON on a command line), got '
        f"{found!r}."
    )


def _order(calls: Sequence[Any]) -> list[int]:
    """The first loss gives the rewards that are logged: one with a reference, as TRL logs them,
    where there is one (["sft", "dpo"])."""
    first = next((i for i, call in enumerate(calls) if call.needs_reference), 0)
    return [first, *(i for i in range(len(calls)) if i != first)]


def _default(config: Any, name: str) -> Any:
    return next(f.default for f in fields(config) if f.name == name)


def _from_config(
    config: Any, name: str, known: Mapping[str, Any], given: set[str], *, named: bool
) -> dict:
    """Arguments of a loss that the configuration gives: those the user changed, and all of them
    where the loss goes by TRL's name (`named`)."""
    found = {}
    for theirs, ours in _SHARED.items():
        if ours not in known or ours in given or not hasattr(config, theirs):
            continue
        if theirs == "discopop_tau" and name != "discopop":
            continue
        value = getattr(config, theirs)
        if named or value != _default(config, theirs):
            found[ours] = value
    return found


def _check_config(config: Any, given: list[str], taken: set[str]) -> None:
    names = {f.name for f in fields(config)}
    for theirs, instead in _TRL_ONLY.items():
        if theirs in names and getattr(config, theirs) != _default(config, theirs):
            raise ValueError(
                f"{theirs} belongs to TRL's own formulas, and loss_type={given} runs prefkern's; "
                f"use {instead}."
            )
    for theirs, ours in _SHARED.items():
        changed = theirs in names and getattr(config, theirs) != _default(config, theirs)
        if changed and ours not in taken:
            raise ValueError(
                f"{theirs}={getattr(config, theirs)} was given, and no loss of {given} has it; "
                "drop it, or pass the loss's own arguments as loss_args."
            )


def _check_families(records: Sequence[Loss], families: Sequence[str]) -> None:
    for record in records:
        if record.family not in families:
            raise ValueError(
                f"loss {record.name!r} is {record.family}, and this trainer has data for "
                f"{' and '.join(families)} losses; "
                + (
                    "it compares prediction errors of a diffusion model."
                    if record.family == "diffusion"
                    else "use another trainer, or prefkern.preference_loss in a loop of your own."
                )
            )
    lists = any(r.family == "listwise" for r in records)
    rows = {r.rows for r in records if r.family == "pairwise"}
    labelled = any("desirable" in losses.required(r) for r in records)
    if len(rows) + lists > 1 or (lists and labelled):
        raise ValueError(
            f"losses {[r.name for r in records]} read different data (ranked lists, pairs, groups "
            "of three answers); train them apart."
        )


def state_options(records: Sequence[Loss]) -> set[str]:
    """Arguments that only the states of losses read."""
    rules = [rule for record in records if (rule := rule_of(record)) is not None]
    names = {name for rule in rules for name in rule.options}
    return names - {name for record in records for name in losses.arguments(record)}


def _has_masks(records: Sequence[Loss]) -> bool:
    return any(MASKS.intersection(losses.required(record)) for record in records)


def _needs(
    records: Sequence[Loss], calls: Sequence[Any], args: Mapping[str, Any],
    columns: Mapping[str, str], *, aux_model: bool,
) -> Needs:  # fmt: skip
    stats = {stat.partition(":")[0] for call in calls for stat in call.stats}
    wanted = [n for r in records for n in losses.required(r)]
    # filled in by the objective, or from the trainer's own batch
    here = {*SeqStats._fields, "desirable", "scored", "cu_groups", *MASKS}
    states = {n for r in records if r.update is not None for n in r.extra}
    missing = [n for n in dict.fromkeys(wanted) if n not in here | states and n not in args]
    aux = ""
    if "ev" in stats:
        aux = "head"
    elif "aux_logp" in missing and "aux_logp" not in columns:
        aux = "logp"
        missing.remove("aux_logp")
    names = ", ".join(r.name for r in records)
    if bool(aux) != aux_model:
        raise ValueError(
            f"loss {names} reads a third, frozen model; pass aux_model=."
            if aux
            else f"aux_model was given, and loss {names} reads no third model; drop it."
        )
    for name in missing:
        if name in _NO_SOURCE:
            raise ValueError(
                f"loss {names} needs {name} ({_NO_SOURCE[name]}), which this trainer has no source "
                "for; call prefkern.preference_loss from a loop of your own."
            )
    for name in columns:
        if name != "item_weights" and all(name not in losses.arguments(r) for r in records):
            roles = {role for r in records for role in r.rows[2:]}
            if name not in roles:
                raise ValueError(f"loss_columns: loss {names} has no argument {name!r}.")
    rows = next((r.rows for r in records if r.family == "pairwise"), ("chosen", "rejected"))
    read = tuple(dict.fromkeys([*missing, *(n for n in columns if n not in rows)]))
    return Needs(
        logp=any(call.needs_reference for call in calls),
        distribution=bool(stats - {"ref_logp", *ONE_MODEL_STATS}),
        tokens=any(r.weights is not None or r.family == "tokenwise" for r in records),
        masks=bool(MASKS.intersection(wanted)),
        aux=aux,
        columns=read,
        lists=any(r.family == "listwise" for r in records),
        roles=rows,
    )
