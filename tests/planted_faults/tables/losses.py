"""Faults of the glue in prefkern/losses: (name, file, old text, new text, tests ...)."""

from __future__ import annotations

B = "prefkern/losses/binding.py"
D = "prefkern/losses/declare.py"
INPUTS = "prefkern/losses/inputs.py"
R = "prefkern/losses/record.py"
C = "prefkern/losses/core.py"
CHECKS = "prefkern/checks.py"
DOC = "prefkern/losses/docstrings.py"
G = "prefkern/ops/ragged.py"
P = "tests/losses/"
BROAD = (
    P + "test_declarations.py",
    P + "test_data.py",
    P + "test_mistakes.py",
    P + "test_bad_input.py",
    P + "test_every_loss.py",
    P + "test_policy_losses.py",
    P + "test_edges.py",
    "tests/test_objective_glue.py",
    "tests/test_objective.py",
    "tests/test_metrics.py",
)

MUTANTS = [
    # ---- binding.py
    (
        "an_alias_fixes_nothing",
        B,
        "    return LOSSES[target], {**fixed, **own}",
        "    return LOSSES[target], {}",
        *BROAD,
    ),
    (
        "what_an_alias_fixes_wins",
        B,
        "given = {**fixed, **given}",
        "given = {**given, **fixed}",
        P + "test_inline.py",
    ),
    (
        "a_reference_free_loss_needs_one",
        B,
        'unused = hyper.get("reference_free", False) or (',
        "unused = False or (",
        P + "test_properties.py::test_shared_arguments_go_to_both",
    ),
    (
        "a_reference_of_weight_0_is_needed",
        B,
        "isinstance(record.reference, str) and hyper[record.reference] == 0",
        "False",
        *BROAD,
    ),
    (
        "the_scale_of_a_likelihood_term_is_dropped",
        B,
        "            weight *= hyper[record.supervised.scale]\n",
        "            pass\n",
        P + "test_pair_golden.py",
    ),
    (
        "statistics_of_the_defaults",
        B,
        "stats=record.statistics(**hyper),",
        "stats=record.statistics(),",
        *BROAD,
    ),
    (
        "hyper_parameters_are_the_defaults",
        B,
        "name: given.get(name, parameter.default)",
        "name: parameter.default",
        *BROAD,
    ),
    (
        "a_stage_gets_nothing",
        B,
        "stage={k: v for k, v in given.items() if k in record.inputs.stage},",
        "stage={},",
        *BROAD,
    ),
    ("a_provisional_loss_is_bound_silently", B, "    record.warn_if_provisional()\n", "", *BROAD),
    (
        "kinds_are_not_checked_when_bound",
        B,
        "        record.check_values((), given)\n",
        "        pass\n",
        *BROAD,
    ),
    ("unknown_arguments_pass", B, "    check_arguments([record], given)\n", "", *BROAD),
    (
        "a_missing_tensor_passes",
        B,
        "if lacking := [name for name in required(record) if name not in there]:",
        "if lacking := [name for name in record.extra if name not in there]:",
        *BROAD,
    ),
    (
        "any_callable_is_a_loss",
        B,
        "if record is None or record.fn is not loss:",
        "if record is None:",
        *BROAD,
    ),
    # ---- declare.py, record.py, inputs.py
    (
        "rewards_without_a_reference_are_log_ratios",
        D,
        "self.rewards[reference is False]",
        "self.rewards[0]",
        *BROAD,
    ),
    (
        "kinds_are_not_checked_alone",
        D,
        "                    record.check_values(args, kwargs)\n",
        "",
        *BROAD,
    ),
    (
        "an_error_does_not_name_the_loss",
        D,
        'raise ValueError(f"loss {fn.__name__!r}: {error}") from error',
        "raise",
        *BROAD,
    ),
    (
        "a_missing_argument_is_pythons_matter",
        D,
        "                    if told := record.call_error(args, kwargs):\n                        raise TypeError(told) from None\n",
        "",
        *BROAD,
    ),
    (
        "a_provisional_loss_is_called_silently",
        D,
        "                if provisional:\n",
        "                if False:\n",
        *BROAD,
    ),
    (
        "the_docstring_stays_as_it_is",
        D,
        "loss.__doc__ = fn.__doc__ = docstrings.complete(record)",
        "docstrings.complete(record)",
        *BROAD,
    ),
    (
        "a_warning_points_into_the_package",
        R,
        "stacklevel=callers_level(),",
        "stacklevel=3,",
        *BROAD,
    ),
    (
        "a_warning_points_at_torch",
        R,
        "for path in (os.path.dirname(__file__), torch.__file__)",
        "for path in (os.path.dirname(__file__),)",
        *BROAD,
    ),
    (
        "a_warning_points_one_frame_off",
        R,
        "frame, level = sys._getframe(1), 1",
        "frame, level = sys._getframe(1), 0",
        *BROAD,
    ),
    ("a_loss_warns_every_time", R, "        _warned.add(self.name)\n", "", *BROAD),
    (
        "the_length_is_asked_of_the_ops",
        R,
        'tuple(name for name in reads if name != "length")',
        "tuple(reads)",
        *BROAD,
    ),
    (
        "a_name_may_be_taken_twice",
        R,
        "        if before != module:\n",
        "        if False:\n",
        *BROAD,
    ),
    (
        "the_register_is_in_no_order",
        R,
        "iter(sorted(self._all()))",
        "iter(self._all())",
        P + "test_core.py",
    ),
    (
        "an_optional_statistic_is_not_filled",
        INPUTS,
        "if _is_open(p) or _is_filled(p)),",
        "if _is_open(p)),",
        *BROAD,
    ),
    (
        "a_bool_is_a_number",
        CHECKS,
        "isinstance(value, numbers.Real) and not isinstance(value, bool)",
        "isinstance(value, numbers.Real)",
        *BROAD,
    ),
    (
        "a_vector_is_a_number",
        CHECKS,
        "        return value.dim() == 0 and value.dtype != torch.bool and not value.is_complex()\n",
        "        return True\n",
        *BROAD,
    ),
    (
        "labels_of_a_list_have_no_name_here",
        INPUTS,
        "hint = of_family(given, family) or FOREIGN.get(given)",
        "hint = FOREIGN.get(given)",
        *BROAD,
    ),
    (
        "foreign_names_are_unknown",
        INPUTS,
        "hint = of_family(given, family) or FOREIGN.get(given)",
        "hint = None",
        *BROAD,
    ),
    # ---- docstrings.py
    (
        "defaults_are_not_shown",
        DOC,
        "            meaning = _with_default(meaning, default_of(parameter))\n",
        "            pass\n",
        *BROAD,
    ),
    (
        "arguments_of_preference_loss_are_not_shown",
        DOC,
        "more = {} if record.weights is record.supervised is None else _through(record)",
        "more = {}",
        *BROAD,
    ),
    (
        "what_a_record_needs_lacks_the_reference",
        DOC,
        "    if record.reference is True:\n",
        "    if False:\n",
        *BROAD,
    ),
    # ---- core.py
    (
        "shapes_broadcast",
        C,
        "    if chosen.shape != rejected.shape:\n",
        "    if chosen.dim() != rejected.dim():\n",
        P + "test_core.py",
    ),
    (
        "a_constant_of_the_caller_is_trained",
        C,
        "    return value.detach().to(like.dtype)\n\n\ndef scalar",
        "    return value.to(like.dtype)\n\n\ndef scalar",
        P + "test_core.py",
    ),
    (
        "a_baseline_is_trained",
        C,
        "return value.detach().to(like.dtype).reshape(())",
        "return value.to(like.dtype).reshape(())",
        *BROAD,
    ),
    ("beta_may_be_0", C, "value, 0.0 < value < INF,", "value, 0.0 <= value < INF,", *BROAD),
    (
        "the_mean_length_counts_empty_answers_as_one",
        C,
        "return total * (length.numel() / length.sum().clamp(min=1.0))",
        "return total * (length.numel() / length.clamp(min=1.0).sum())",
        P + "test_core.py",
    ),
    (
        "an_empty_answer_stays_in_its_list",
        C,
        'return torch.where(data("length", length, relevance) > 0, relevance, torch.nan)',
        'return torch.where(data("length", length, relevance) >= 0, relevance, torch.nan)',
        *BROAD,
    ),
    ("the_best_of_equals_is_imitated", C, "    if strict:\n", "    if False:\n", *BROAD),
    # ---- ops/ragged.py
    (
        "a_boundary_belongs_to_the_list_before",
        G,
        "return torch.searchsorted(cu[1:].contiguous(), position, right=True)",
        "return torch.searchsorted(cu[1:].contiguous(), position)",
        *BROAD,
    ),
    ("ranks_are_ascending", G, "descending=descending, stable=True)", "stable=True)", *BROAD),
    (
        "left_out_answers_come_first",
        G,
        "torch.argsort((~kept)[order].long(), stable=True)",
        "torch.argsort(kept[order].long(), stable=True)",
        *BROAD,
    ),
    (
        "the_last_of_the_best_is_the_best",
        G,
        'first = position.new_full((size,), n).scatter_reduce(\n        0, segment, torch.where(top, position, n), "amin"\n    )',
        'first = position.new_full((size,), -1).scatter_reduce(\n        0, segment, torch.where(top, position, -1), "amax"\n    )',
        P + "test_catalogue_options.py",
    ),
]
