"""Wrong calls of the head ops: a ValueError that says what must hold, what came, what to do."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import FP32, FP64, SMALL, make_inputs

import prefkern
from prefkern import Head

N, V, D = 6, 10, 4


NUMBERS = ("scale", "softcap", "temperature")


def good():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(N, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "targets": torch.randint(0, V, (N,), generator=g),
    }


def good_pair():
    g = torch.Generator().manual_seed(1)
    return {
        **good(),
        "ref_hidden": torch.randn(N, D, generator=g),
        "ref_weight": torch.randn(V, D, generator=g),
    }


def arguments(call: dict) -> dict:
    """The public arguments of a flat call: `weight`, `bias`, `softcap` ... become heads."""
    call = dict(call)
    for prefix in ("", "ref_", "aux_"):
        numbers = {k: call.pop(prefix + k) for k in NUMBERS if prefix + k in call}
        weight, bias = call.pop(f"{prefix}weight", None), call.pop(f"{prefix}bias", None)
        head = weight if bias is None and not numbers else Head(weight, bias, **numbers)
        if head is not None:
            call[f"{prefix}head"] = head
    return call


# name -> (changes to the good call, words that the message must hold)
HEAD = {
    "hidden_1d": ({"hidden": torch.zeros(D)}, ["hidden", "[4]"]),
    "hidden_4d": ({"hidden": torch.zeros(1, 2, 3, D)}, ["hidden"]),
    "hidden_other_D": ({"hidden": torch.zeros(N, 5)}, ["hidden", "D = 4", "[6, 5]"]),
    "hidden_integer": (
        {"hidden": torch.zeros(N, D, dtype=torch.long)},
        ["hidden", "int64", "float"],
    ),
    "hidden_fp8": ({"hidden": torch.zeros(N, D).to(torch.float8_e4m3fn)}, ["hidden", "float8"]),
    "hidden_complex": (
        {"hidden": torch.zeros(N, D, dtype=torch.complex64)},
        ["hidden", "complex64"],
    ),
    "hidden_list": ({"hidden": [[0.0] * D] * N}, ["hidden", "list"]),
    "hidden_none": ({"hidden": None}, ["hidden", "None"]),
    "weight_1d": ({"weight": torch.zeros(V)}, ["weight", "[V, D]"]),
    "weight_transposed": (
        {"weight": torch.randn(V, V), "hidden": torch.zeros(N, 7)},
        ["D = 10"],
    ),
    "head_transposed": ({"weight": torch.zeros(D, V)}, ["[4, 10]", "transposed", "weight.T"]),
    "weight_empty_vocabulary": ({"weight": torch.zeros(0, D)}, ["weight", "[0, 4]"]),
    "weight_empty_hidden": ({"weight": torch.zeros(V, 0), "hidden": torch.zeros(N, 0)}, ["weight"]),
    "weight_integer": ({"weight": torch.zeros(V, D, dtype=torch.int8)}, ["weight", "int8"]),
    "weight_list": ({"weight": [1.0]}, ["weight", "list"]),
    "weight_other_device": (
        {"weight": torch.zeros(V, D, device="meta")},
        ["weight", "meta", "cpu"],
    ),
    "targets_short": ({"targets": torch.zeros(N - 1, dtype=torch.long)}, ["targets", "[6]", "[5]"]),
    "targets_2d": ({"targets": torch.zeros(2, 3, dtype=torch.long)}, ["targets", "[2, 3]"]),
    "targets_float": ({"targets": torch.zeros(N)}, ["targets", "float32", "long"]),
    "targets_bool": ({"targets": torch.zeros(N, dtype=torch.bool)}, ["targets", "bool"]),
    "targets_list": ({"targets": [0] * N}, ["targets", "list"]),
    "targets_other_device": (
        {"targets": torch.zeros(N, dtype=torch.long, device="meta")},
        ["targets", "meta"],
    ),
    "target_too_large": (
        {"targets": torch.tensor([0, 1, V, 2, 3, 4])},
        ["targets", "[0, 10)", "10", "position 2"],
    ),
    "target_negative": (
        {"targets": torch.tensor([0, 1, 2, -1, 3, 4])},
        ["targets", "-1", "position 3"],
    ),
    "target_is_another_ignore_index": (
        {"targets": torch.tensor([0, 1, 2, 3, 4, -100]), "ignore_index": -1},
        ["targets", "-100", "ignore_index = -1"],
    ),
    "bias_shape": ({"bias": torch.zeros(V + 1)}, ["bias", "[10]", "[11]"]),
    "bias_2d": ({"bias": torch.zeros(1, V)}, ["bias", "[1, 10]"]),
    "bias_integer": ({"bias": torch.zeros(V, dtype=torch.long)}, ["bias", "int64"]),
    "bias_other_device": ({"bias": torch.zeros(V, device="meta")}, ["bias", "meta"]),
    "scale_nan": ({"scale": float("nan")}, ["scale", "nan"]),
    "scale_inf": ({"scale": float("inf")}, ["scale", "inf"]),
    "softcap_zero": ({"softcap": 0.0}, ["softcap", "0.0"]),
    "softcap_negative": ({"softcap": -30.0}, ["softcap", "-30"]),
    "softcap_nan": ({"softcap": float("nan")}, ["softcap", "nan"]),
    "temperature_zero": ({"temperature": 0.0}, ["temperature", "0.0"]),
    "temperature_negative": ({"temperature": -1.0}, ["temperature", "-1"]),
    "temperature_inf": ({"temperature": float("inf")}, ["temperature", "inf"]),
    "stats_empty": ({"stats": ()}, ["stats"]),
    "stats_unknown": ({"stats": ("logp", "entropy")}, ["entropy", "ent"]),
    "stats_misspelt": ({"stats": ("lgop",)}, ["lgop", "logp"]),
    "stats_empty_string": ({"stats": ""}, ["stats"]),
    "stats_superfluous_parameter": ({"stats": ("logp:3",)}, ["logp", "no parameter"]),
    "stats_not_a_name": ({"stats": (3,)}, ["3"]),
    "budget_negative": ({"memory_budget": -1}, ["memory_budget", "-1"]),
    "budget_float": ({"memory_budget": 1e9}, ["memory_budget", "1000000000.0"]),
    "num_scored_too_small": (
        {"targets": torch.tensor([0, 1, 2, 3, 4, -100]), "num_scored": 3},
        ["num_scored", "3", "5"],
    ),
    "num_scored_too_large": (
        {"targets": torch.tensor([0, 1, 2, 3, 4, -100]), "num_scored": 6},
        ["num_scored", "6", "5"],
    ),
    "num_scored_negative": ({"num_scored": -1}, ["num_scored", "-1"]),
    "backend_unknown": ({"backend": "cudnn"}, ["backend", "cudnn", "eager", "cpu", "auto"]),
    "backend_none": ({"backend": None}, ["backend", "None"]),
}
PAIR = {
    "ref_hidden_other_rows": ({"ref_hidden": torch.zeros(N + 1, D)}, ["ref_hidden", "[7, 4]"]),
    "ref_hidden_other_D": ({"ref_hidden": torch.zeros(N, D + 1)}, ["ref_hidden", "[6, 5]"]),
    "ref_hidden_none": ({"ref_hidden": None}, ["ref_hidden", "None"]),
    "ref_hidden_requires_grad": (
        {"ref_hidden": torch.zeros(N, D, requires_grad=True)},
        ["ref_hidden", "detach"],
    ),
    "ref_weight_requires_grad": (
        {"ref_weight": torch.zeros(V, D, requires_grad=True)},
        ["ref_head", "weight", "detach"],
    ),
    "ref_bias_requires_grad": (
        {"ref_bias": torch.zeros(V, requires_grad=True)},
        ["ref_head", "bias", "detach"],
    ),
    "ref_weight_other_vocabulary": (
        {"ref_weight": torch.zeros(V + 2, D)},
        ["ref_head", "V = 10", "[12, 4]"],
    ),
    "ref_weight_default_of_another_width": (
        {"ref_hidden": torch.zeros(N, D + 2), "ref_weight": None},
        ["ref_", "[6, 6]"],
    ),
    "ref_bias_shape": ({"ref_bias": torch.zeros(V - 1)}, ["ref_head", "bias", "[9]"]),
    "ref_temperature_zero": ({"ref_temperature": 0.0}, ["temperature"]),
    "ref_softcap_negative": ({"ref_softcap": -1.0}, ["softcap"]),
    "two_parameters_of_one_field": (
        {"stats": ("jsd:0.5", "jsd:0.1")},
        ["jsd:0.5", "jsd:0.1", "one parameter"],
    ),
    "parameter_missing": ({"stats": ("jsd",)}, ["jsd", "parameter"]),
    "parameter_not_a_number": ({"stats": ("alpha:half",)}, ["alpha:half"]),
    "jsd_out_of_range": ({"stats": ("jsd:1.5",)}, ["jsd:1.5", "0 < b < 1"]),
    "alpha_out_of_range": ({"stats": ("alpha:1",)}, ["alpha:1"]),
    "renyi_out_of_range": ({"stats": ("renyi:0",)}, ["renyi:0"]),
    "mix_out_of_range": ({"stats": ("mix:1.1",)}, ["mix:1.1"]),
    "mix_nan": ({"stats": ("mix:nan",)}, ["mix:nan"]),
    "bkl_zero": ({"stats": ("bkl:0",)}, ["bkl:0"]),
    "bkl_fraction": ({"stats": ("bkl:2.5",)}, ["bkl:2.5"]),
    "bkl_infinite": ({"stats": ("bkl:inf",)}, ["bkl:inf"]),
    "superfluous_parameter": ({"stats": ("fkl:0.5",)}, ["fkl", "no parameter"]),
    "misspelt": ({"stats": ("flk",)}, ["flk", "fkl"]),
    "ev_without_source": ({"stats": ("ev",)}, ["ev", "values", "aux_hidden"]),
    "ev_two_sources": (
        {
            "stats": ("ev",),
            "values": torch.zeros(V),
            "aux_hidden": torch.zeros(N, D),
            "aux_weight": torch.zeros(V, D),
        },
        ["ev", "one source"],
    ),
    "aux_half": ({"stats": ("ev",), "aux_hidden": torch.zeros(N, D)}, ["aux_hidden", "aux_head"]),
    "aux_requires_grad": (
        {
            "stats": ("ev",),
            "aux_hidden": torch.zeros(N, D, requires_grad=True),
            "aux_weight": torch.zeros(V, D),
        },
        ["aux_hidden"],
    ),
    "aux_other_vocabulary": (
        {"stats": ("ev",), "aux_hidden": torch.zeros(N, D), "aux_weight": torch.zeros(V + 1, D)},
        ["aux_head"],
    ),
    "values_dense": (
        {"stats": ("ev",), "values": torch.zeros(N, V)},
        ["values", "[6, 10]", "dense"],
    ),
    "values_short": ({"stats": ("ev",), "values": torch.zeros(V - 1)}, ["values", "[9]"]),
    "values_requires_grad": (
        {"stats": ("ev",), "values": torch.zeros(V, requires_grad=True)},
        ["values"],
    ),
    "values_integer": (
        {"stats": ("ev",), "values": torch.zeros(V, dtype=torch.long)},
        ["values", "int64"],
    ),
    "values_other_device": (
        {"stats": ("ev",), "values": torch.zeros(V, device="meta")},
        ["values", "meta"],
    ),
    "sparse_shapes_differ": (
        {"stats": ("ev",), "values": (torch.zeros(N, 2, dtype=torch.long), torch.zeros(N, 3))},
        ["values", "[6, 2]"],
    ),
    "sparse_swapped": (
        {"stats": ("ev",), "values": (torch.zeros(N, 2), torch.zeros(N, 2, dtype=torch.long))},
        ["values", "index"],
    ),
    "sparse_index_out_of_range": (
        {"stats": ("ev",), "values": (torch.full((N, 2), V), torch.zeros(N, 2))},
        ["values", "10"],
    ),
    "sparse_index_negative": (
        {"stats": ("ev",), "values": (torch.full((N, 2), -1), torch.zeros(N, 2))},
        ["values", "-1"],
    ),
    "values_without_ev": ({"stats": ("fkl",), "values": torch.zeros(V)}, ["values", "ev"]),
}


def check_message(error: pytest.ExceptionInfo, words) -> None:
    text = str(error.value)
    for word in words:
        assert word in text, f"the message does not say {word!r}: {text}"
    assert len(text) > 30, f"not a sentence: {text}"


@pytest.mark.parametrize("name", HEAD)
def test_linear_logps(backend, name):
    changes, words = HEAD[name]
    with pytest.raises(ValueError) as error:
        prefkern.linear_logps(**arguments({**good(), "backend": backend, **changes}))
    check_message(error, words)


@pytest.mark.parametrize("name", HEAD)
def test_linear_divergence_checks_the_policy_alike(backend, name):
    changes, words = HEAD[name]
    with pytest.raises(ValueError) as error:
        prefkern.linear_divergence(**arguments({**good_pair(), "backend": backend, **changes}))
    if name not in ("hidden_list", "hidden_none"):
        check_message(error, words)


@pytest.mark.parametrize("name", PAIR)
def test_linear_divergence(backend, name):
    changes, words = PAIR[name]
    with pytest.raises(ValueError) as error:
        prefkern.linear_divergence(**arguments({**good_pair(), "backend": backend, **changes}))
    check_message(error, words)


@pytest.mark.parametrize("stat", ["fkl", "jsd:0.5", "ref_logp", "ev"])
def test_two_model_statistics_point_to_linear_divergence(backend, stat):
    with pytest.raises(ValueError) as error:
        prefkern.linear_logps(**arguments(good()), stats=(stat,), backend=backend)
    check_message(error, ["linear_divergence"])


def test_a_distributed_head_says_both_ways_in(backend):
    class DTensor(torch.Tensor):
        """Stands in for torch.distributed's class, whose name is what the check reads."""

    weight = torch.zeros(V, D).as_subclass(DTensor)
    with pytest.raises(ValueError, match="at_head"):
        prefkern.linear_logps(**arguments({**good(), "weight": weight}), backend=backend)


def test_targets_out_of_range_are_found_in_compiled_code(backend):
    """Values cannot be read while tracing, so the op itself checks when it runs."""
    torch._dynamo.reset()
    call = good()
    step = torch.compile(
        lambda t: prefkern.linear_logps(call["hidden"], call["weight"], t, backend=backend).logp,
        fullgraph=True,
        backend="aot_eager",
    )
    step(call["targets"])
    with pytest.raises(ValueError, match="targets"):
        step(torch.full((N,), V))


def test_the_same_field_twice_with_one_parameter_is_fine(backend):
    """A loss and a metric may both ask for a statistic."""
    inputs = make_inputs(SMALL, FP32)
    out = prefkern.linear_divergence(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        inputs.ref_weight,
        stats=("logp", "jsd:0.5", "logp", "jsd:0.50"),
        backend=backend,
    )
    assert out.jsd.shape == (23,)


def test_nothing_is_changed_in_place(backend):
    inputs = make_inputs(SMALL, FP64)
    given = {k: v for k, v in vars(inputs).items() if isinstance(v, torch.Tensor)}
    before = {k: v.clone() for k, v in given.items()}
    hidden = inputs.hidden.detach().requires_grad_()
    out = prefkern.linear_divergence(
        hidden,
        inputs.weight,
        inputs.targets,
        inputs.ref_hidden,
        inputs.ref_weight,
        values=inputs.values,
        stats=("logp", "fkl", "ev"),
        backend=backend,
    )
    (out.logp + out.fkl + out.ev).sum().backward()
    for name, x in given.items():
        assert torch.equal(x.detach(), before[name]), name


@pytest.mark.parametrize(
    "op", ["linear_logps", "linear_divergence", "logits_logps", "selective_log_softmax"]
)
def test_public_functions_are_documented(op):
    """Every argument appears in the docstring, with what is returned and raised."""
    function = getattr(prefkern, op)
    text = inspect.getdoc(function)
    for name in inspect.signature(function).parameters:
        assert name in text, f"{op} does not document {name}"
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"{op} has no {section}"
