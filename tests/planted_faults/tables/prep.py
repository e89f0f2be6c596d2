"""Faults of the preparation of data: (name, file, old text, new text, tests ...)."""

from __future__ import annotations

from rows import Row, of

# Rows out of judgements.
PREP: list[Row] = [
    *of(
        "prefkern/prep/pairs.py",
        "tests/prep/test_pairs.py",
        ("found.scores[win] > found.scores[lose]]", "found.scores[win] >= found.scores[lose]]"),
        ('"adjacent": [(a, a + 1) for', '"adjacent": [(0, a + 1) for'),
        ('"best_vs_worst": [(0, last)]', '"best_vs_worst": [(0, 1)]'),
        ("key=lambda a: -wins[a])", "key=lambda a: wins[a])"),
        ("[sum(line) for line in q]", "[max(line) for line in q]"),
        ('f"rejected_{name}": values[loser]', 'f"rejected_{name}": values[winner]'),
        ("abs(q[a][b] + q[b][a] - 1.0) > 1e-6", "abs(q[a][b] + q[b][a] - 1.0) > 1.0"),
        ('"pref_prob": q[win][lose]', '"pref_prob": q[lose][win]'),
        ("            if first == j:", "            if first <= j:"),
    ),
    *of(
        "prefkern/prep/columns.py",
        "tests/prep/test_pairs.py",
        ("key=lambda i: -self.scores[i])", "key=lambda i: self.scores[i])"),
        ("if distinct and (first", "if (first"),
        ('if k not in used and k != "prompt"', 'if k != "prompt"'),
        ("list_of(data, name, len(texts)) for", "list_of(data, name) for"),
    ),
    *of(
        "prefkern/prep/cells.py",
        "tests/prep tests/train/data",
        ("[max(ranks) - rank for rank in ranks]", "[rank - max(ranks) for rank in ranks]"),
        ("if len(given) == 2:", "if len(given) == 3:"),
        ("if isinstance(value, bool) or not", "if not"),
        ("    if not math.isfinite(found):", "    if found is None:"),
    ),
    *of(
        "prefkern/prep/table.py",
        "tests/prep/test_pairs.py",
        ("rows.append(dict(row))", "rows.append(row)"),
        ("enumerate(read_rows(table))", "enumerate(read_rows(table), 1)"),
        ("    if not _is_dataset(table):", "    if rows:"),
        ("[row.get(name) for row in rows]", "[row.get(name) for row in rows[::-1]]"),
    ),
    *of(
        "prefkern/prep/rejection.py",
        "tests/prep/test_rejection.py",
        ("math.exp((scores[i] - best) / beta)", "math.exp((best - scores[i]) / beta)"),
        ("best = max(scores[i] for i in left)", "best = max(scores)"),
        ("default_rng([seed, next(numbers)])", "default_rng([seed])"),
        ("found.scores[b] > found.scores[a]", "found.scores[b] >= found.scores[a]"),
        ("            played += 1", "            played += 0"),
        ("playing[len(playing) - len(playing) % 2 :]", "[]"),
    ),
    *of(
        "prefkern/prep/curriculum.py",
        "tests/prep/test_curriculum.py",
        ("key=lambda entry: -entry[0])", "key=lambda entry: entry[0])"),
        ("(abs(gaps[best] - gaps[other])", "(gaps[best] - gaps[other]"),
        ('"best_vs_rest")[::-1]', '"best_vs_rest")'),
        ("for stage in sorted(stages)]", "for stage in stages]"),
    ),
    *of(
        "prefkern/prep/mutual_ranking.py",
        "tests/prep/test_mutual_ranking.py",
        ("damping * (links @ tests)", "damping * (links @ tests) / len(tests)"),
        ("(programs @ links)", "(links @ tests)[: links.shape[1]]"),
        ("[-s for s in seconds]", "[s for s in seconds]"),
        ("if all(line)]", "if any(line)]"),
        ('if k != "ranks"}', "}"),
    ),
    *of(
        "prefkern/prep/conditioning.py",
        "tests/prep/test_conditioning.py",
        (
            "(chosen_score, rejected_score)), wanted[1]",
            "(chosen_score, rejected_score)), wanted[0]",
        ),
        ("good_prefix if label else bad_prefix", "bad_prefix if label else good_prefix"),
        ("round(100 * v)", "round(10 * v)"),
        ("math.fsum(a * b for", "math.fsum(a + b for"),
        ("        if not high > low:", "        if high < low:"),
        ("abs(length - 1.0) <= 0.01", "abs(length - 1.0) <= 0.5"),
    ),
    *of(
        "prefkern/prep/prompts.py",
        "tests/prep/test_conditioning.py",
        ("{words}{separator}{prompt}", "{prompt}{separator}{words}"),
        ("return [first, *prompt[1:]]", "return [first, *prompt]"),
        ("exchange[name] = other + name.removeprefix(one)", "exchange[name] = name"),
        ("    refuse_prompt_bound(data)\n", ""),
    ),
    *of(
        "prefkern/prep/steps.py",
        "tests/prep/test_steps.py",
        ("[0.0] * start + [1.0]", "[1.0] * start + [1.0]"),
        ("max(1.0, counts[0])", "counts[0]"),
        ("max(confidence, 0.5)", "confidence"),
        ("min(_shared(ids[0], ids[1])", "max(_shared(ids[0], ids[1])"),
        ('*sides[0][:start], ""]', "*sides[0][:start]]"),
    ),
    *of(
        "prefkern/prep/annotators.py",
        "tests/prep/test_annotators.py",
        ("texts[preferred], texts[1 - preferred]", "texts[1 - preferred], texts[preferred]"),
        ("            if name in seen:", "            if not seen:"),
        ("eta = known.get(name, default)", "eta = default"),
        ("if not 0.0 < start < 1.0:", "if not 0.0 <= start <= 1.0:"),
    ),
    *of(
        "prefkern/prep/weights.py",
        "tests/prep/test_annotators.py",
        ('row["weight"] * len(out) / total', 'row["weight"] / total'),
        ("    if found < 0.0:", "    if found < -1.0:"),
        ("if len(values) != len(tokens):", "if len(values) < len(tokens):"),
        ('if row.get("weight") is not None:', 'if row.get("weights") is not None:'),
    ),
    *of(
        "prefkern/prep/triples.py",
        "tests/prep/test_curriculum.py",
        ("order[0], order[1], order[-1]", "order[0], order[-1], order[1]"),
        ("first == second or second == last", "first == second"),
    ),
]

MUTANTS: list[Row] = PREP
