"""Mistakes of a caller, alone and through preference_loss: what must hold, came, and is to do."""

from __future__ import annotations

import importlib
import inspect
import math
import re

import numpy as np
import pytest
import torch
from loss_examples import EVERY, LISTWISE, PAIRWISE, POINTWISE, TOKENWISE, Example

from prefkern import LOSSES, Head, PreferenceLoss, SeqStats, losses, preference_loss
from prefkern.losses import docstrings
from prefkern.losses.foreign_names import FOREIGN

pytestmark = pytest.mark.filterwarnings("ignore:loss .* is provisional:UserWarning")
CU = torch.tensor([0, 2, 4], dtype=torch.int32)


def answers(n=2):
    return SeqStats(
        logp=-torch.ones(n).double(), ref_logp=-torch.ones(n).double(), length=torch.ones(n)
    )


def objective(**args):
    """preference_loss on two pairs (or two lists of two)."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 3, 4, generator=g), torch.randn(5, 4, generator=g)
    targets = torch.randint(0, 5, (4, 3), generator=g)
    return preference_loss(hidden, head, targets, **{"ref_logp": torch.zeros(4, 3), **args})


def kinds(name: str, *wanted: str) -> list[str]:
    """Arguments of the loss whose annotation has one of these parts and no tensor."""
    found = LOSSES[name].inputs.kinds
    own = inspect.signature(LOSSES[name].fn).parameters
    return [k for k in own if set(found[k].parts) & set(wanted) and "Tensor" not in found[k].parts]


# ---- something else in place of statistics -------------------------------------------------------


@pytest.mark.parametrize("name", PAIRWISE + POINTWISE + TOKENWISE)
def test_tensors_in_place_of_statistics(name):
    example = Example(name, 3)
    kind = "TokenStats" if name in TOKENWISE else "SeqStats"
    rows = [torch.zeros(3)] * len(example.rows)
    if name in TOKENWISE:
        rows.append(CU)
    message = rf"^loss '{name}': \w+ must be a {kind}, got a tensor \[3\]; build one: prefkern"
    with pytest.raises(ValueError, match=rf"{message}\.{kind}\(\w+=") as error:
        LOSSES[name](*rows, **example.extra)
    for field in LOSSES[name].stats:
        assert f"{field}=..." in str(error.value)
    assert ("ref_logp=..." in str(error.value)) == LOSSES[name].needs_reference


def test_what_dpo_says_of_tensors():
    with pytest.raises(ValueError) as error:
        losses.dpo(torch.zeros(2), torch.zeros(2))
    assert str(error.value) == (
        "loss 'dpo': chosen must be a SeqStats, got a tensor [2]; build one: "
        "prefkern.SeqStats(logp=..., ref_logp=...)."
    )


# ---- hyper-parameters of another kind ------------------------------------------------------------

NUMBERS = [(n, k) for n in EVERY for k in kinds(n, "float", "int")]
FLAGS = [(n, k) for n in EVERY for k in kinds(n, "bool")]
TEXTS = [(n, k) for n in EVERY for k in kinds(n, "str") if k != "backend"]


def call(name: str, **args):
    record = LOSSES[name]
    if record.family == "diffusion":
        errors = [torch.rand(3, 2) if name in ("dense_dpo", "tlpo") else torch.rand(3)] * 4
        made = {"sigma": 0.5, "labels": torch.ones(3, 2), "p_win": torch.ones(3) / 2,
                "phi": torch.rand(3), "relevance": torch.rand(3),
                "cu_groups": torch.tensor([0, 3])}  # fmt: skip
        given = {k: v for k, v in made.items() if k in record.extra}
        return record(*errors[: len(record.inputs.positional)], **{**given, **args})
    example = Example(name, 3)
    example.extra |= args
    return example()


@pytest.mark.parametrize(("name", "argument"), NUMBERS)
def test_a_number_that_is_none(name, argument):
    whole = "int" in LOSSES[name].inputs.kinds[argument].parts
    words = "an integer" if whole else "a number"
    for wrong, got in (
        ("0.1", "the string '0.1'"), (True, "True"), ([0.1], "list"),
        (torch.zeros(3), r"a tensor \[3\]"),
    ):  # fmt: skip
        message = rf"^loss '{name}': {argument} must be {words}( or None)?, got {got}"
        with pytest.raises(ValueError, match=message):
            call(name, **{argument: wrong})
    if whole:
        with pytest.raises(ValueError, match=f"{argument} must be an integer"):
            call(name, **{argument: 1.5})


@pytest.mark.parametrize(("name", "argument"), FLAGS)
def test_a_flag_that_is_none(name, argument):
    for wrong, got in (("false", "the string 'false'"), (0, "0"), (None, "None")):
        with pytest.raises(ValueError) as error:
            call(name, **{argument: wrong})
        assert str(error.value) == (
            f"loss {name!r}: {argument} must be True or False, got {got}; write {argument}=True or "
            f"{argument}=False."
        )


@pytest.mark.parametrize(("name", "argument"), TEXTS)
def test_a_word_that_is_none(name, argument):
    for wrong in (1, True, torch.zeros(2)):
        with pytest.raises(ValueError, match=rf"^loss '{name}': {argument} must be a string"):
            call(name, **{argument: wrong})


def test_numbers_of_any_library_are_numbers():
    chosen, rejected = answers(), answers()
    want = losses.dpo(chosen, rejected, beta=0.25)
    for beta in (np.float32(0.25), np.float64(0.25), torch.tensor(0.25)):
        assert torch.equal(losses.simpo(chosen, rejected, beta=beta),
                           losses.simpo(chosen, rejected, beta=0.25))  # fmt: skip
        assert torch.equal(losses.dpo(chosen, rejected, beta=beta), want)
    assert losses.bind("gkd", {"beta": np.float64(0.25)}).stats == ("jsd:0.25",)
    assert torch.equal(objective(loss="dpo", beta=np.float32(0.25))[0], objective(beta=0.25)[0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"beta": "0.1"}, "beta must be a number or a tensor, got the string '0.1'; write it "
         "without quotes."),
        ({"beta": "0,1"}, "beta must be a number or a tensor, got the string '0,1'; it is: "
         "Strength of the pull to the reference, > 0, number or `[P]`. Default 0.1."),
        ({"loss": "aot", "paired": "no"}, "paired must be True or False, got the string 'no'; "
         "write paired=True or paired=False."),
        ({"loss": "ld_dpo", "alpha": "0.5"}, "alpha must be a number, got the string '0.5'; write "
         "it without quotes."),
        ({"loss": "orpo", "nll_weight": "1"}, "nll_weight must be a number, got the string '1'; "
         "write it without quotes."),
        ({"loss": "modpo", "w": "half", "margin_reward_chosen": torch.zeros(2, 1),
          "margin_reward_rejected": torch.zeros(2, 1)}, "w must be a list of numbers, got the "
         "string 'half'."),
        ({"loss": "madpo", "rm_margin": [1.0, 2.0]}, "rm_margin must be a tensor, got list; it "
         "is: `[P]` reward model's score of chosen minus rejected, h. Constant."),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)  # fmt: skip
def test_kinds_are_checked_before_any_work(args, message, monkeypatch):
    monkeypatch.setattr("prefkern.objective.preference_loss.token_statistics", None)
    with pytest.raises(ValueError) as error:
        objective(**args)
    assert str(error.value) == f"loss {args.get('loss', 'dpo')!r}: {message}"


# ---- what is missing -----------------------------------------------------------------------------

REQUIRED = [(n, k) for n in EVERY for k in losses.required(n)]


@pytest.mark.parametrize(("name", "argument"), REQUIRED)
def test_a_missing_tensor_is_described(name, argument):
    record = LOSSES[name]
    supplied = [k for k in losses.required(name) if k != argument]
    with pytest.raises(ValueError) as error:
        losses.bind(name, {}, supplied=supplied)
    text = str(error.value)
    assert text.startswith(f"loss {name!r} needs {argument} (")
    meaning = re.search(r"\((.*)\); pass it by name\.$", text)[1]
    assert meaning == docstrings.meanings(record)[argument].rstrip(".")
    assert "`[" in meaning or "number" in meaning or "a int" in meaning  # its shape, or a number
    if argument in record.inputs.required:
        rows = [SeqStats()] * len(record.inputs.positional)
        if record.family not in ("pairwise", "pointwise"):
            rows = [torch.zeros(2)] * len(rows)
        given = {k: torch.zeros(2) for k in record.inputs.required if k != argument}
        with pytest.raises(TypeError) as error:  # what Python raises, with more to read
            record(*rows, **given)
        assert str(error.value).startswith(f"loss {name!r} needs {argument} ({meaning[:30]}")


def test_kto_says_where_its_baseline_comes_from():
    desirable = torch.tensor([True, False])
    with pytest.raises(TypeError, match="needs kl_baseline") as alone:
        losses.kto(answers(), desirable=desirable)
    with pytest.raises(ValueError, match="needs kl_baseline") as bound:
        objective(loss="kto", desirable=torch.tensor([True, False] * 2))
    for error in (alone, bound):
        path = re.search(r"(prefkern\.[\w.]+)\(mismatched\)", str(error.value))[1]
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name)(answers()).item() == 0.0


def test_paths_in_the_meanings_lead_somewhere():
    for record in LOSSES.values():
        for meaning in docstrings.meanings(record).values():
            for path in re.findall(r"prefkern\.losses\.[\w.]*\w", meaning):
                module, _, name = path.rpartition(".")
                assert callable(getattr(importlib.import_module(module), name)), path


def test_nothing_at_all():
    with pytest.raises(
        TypeError, match=r"^loss 'dpo' needs chosen \(Statistics .* and rejected \("
    ):
        losses.dpo()
    with pytest.raises(
        TypeError, match=r"^loss 'lipo' needs relevance .* and cu_groups \(`\[G\+1\]`"
    ):
        losses.lipo(torch.zeros(2))
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        losses.dpo(answers(), answers(), 0.1)


# ---- names of other libraries --------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTWISE)
def test_labels_of_a_list_are_relevance(name):
    with pytest.raises(TypeError) as error:
        LOSSES[name](torch.zeros(4), labels=torch.zeros(4), cu_groups=CU)
    assert str(error.value) == f"loss {name!r} has no argument 'labels'; write relevance instead."


def test_labels_elsewhere():
    with pytest.raises(TypeError, match=r"no argument 'labels'; write desirable instead\.$"):
        losses.kto(answers(), labels=torch.ones(2), kl_baseline=0.0)
    with pytest.raises(ValueError, match=r"write targets \(token labels\), relevance "):
        objective(loss="lipo", labels=torch.zeros(4), cu_groups=CU)
    with pytest.raises(TypeError, match="no argument 'betta'; nearest: beta"):
        losses.dpo(answers(), answers(), betta=0.1)
    with pytest.raises(TypeError, match="loss 'orpo' takes 'nll_weight' through preference_loss"):
        losses.orpo(answers(), answers(), nll_weight=1.0)
    with pytest.raises(ValueError, match=r"write loss='fdpo' with its argument divergence"):
        PreferenceLoss("dpo", f_divergence_type="js_divergence")


OWN = {
    name
    for fn in (preference_loss, Head, *(r.fn for r in LOSSES.values()))
    for name in inspect.signature(fn).parameters
} | {name for r in LOSSES.values() for name in r.inputs.arguments}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_said_instead_of_a_foreign_name_exists(name):
    hint = FOREIGN[name]
    assert name not in inspect.signature(preference_loss).parameters  # it would never be refused
    words = re.findall(r"loss='(\w+)'", hint)
    for several in re.findall(r"loss=\[(.*?)\]", hint):
        words += re.findall(r"'(\w+)'", several)
    assert set(words) <= set(LOSSES)
    for argument in re.findall(r"with its argument (\w+)|with (\w+)=", hint):
        assert "".join(argument) in losses.arguments(words[-1])
    for path in re.findall(r"prefkern\.[\w.]*\w", hint):
        if path != "prefkern.losses":  # prefkern.losses.<name>
            module, _, last = path.rpartition(".")
            assert hasattr(importlib.import_module(module), last), path
    first = re.match(r"\w+", hint)[0]
    assert first in OWN | {"prefkern", "nothing", "a"}, hint
    message = losses.check_arguments
    with pytest.raises(ValueError, match=re.escape(f"no argument {name!r}; write {hint} instead.")):
        message([LOSSES["sft"]], [name])


# ---- lists where the objective wants tensors -----------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"loss": "lipo", "relevance": [1.0, 0.0] * 2, "cu_groups": CU}, "relevance"),
        ({"loss": "lipo", "relevance": torch.zeros(4), "cu_groups": [0, 2, 4]}, "cu_groups"),
        ({"loss": "kto", "desirable": [True, False] * 2, "kl_baseline": 0.0}, "desirable"),
        ({"loss": "dpo", "item_weights": [1.0, 0.0]}, "item_weights"),
        ({"loss": "dpo", "token_weights": [[1.0] * 3] * 4}, "token_weights"),
        ({"loss": "dpo", "token_weights": {"logp": [[1.0] * 3] * 4}}, r"token_weights\['logp'\]"),
        ({"loss": "dpo", "ref_logp": [[0.0] * 3] * 4}, "ref_logp"),
        ({"loss": "dpo", "ref_logp": None, "ref_seq_logp": [0.0] * 4}, "ref_seq_logp"),
        ({"loss": "orpo", "likelihood_targets": [[1] * 3] * 4}, "likelihood_targets"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lists_in_place_of_tensors(args, message):
    with pytest.raises(ValueError, match=f"{message} must be a torch.Tensor, got list"):
        objective(**args)


@pytest.mark.parametrize("loss", [None, {}, [], 3, ["dpo", None], torch.nn.Linear])
def test_what_is_no_loss(loss):
    with pytest.raises(ValueError, match=r"^loss must be a name of prefkern\.LOSSES"):
        objective(loss=loss)


def test_a_nan_is_no_number_for_a_loss():
    """Kinds let it pass; the range does not."""
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got nan"):
        losses.dpo(answers(), answers(), beta=math.nan)
