"""Faults of the trainer, by kind: (name, file, old text, new text, tests ...)."""

from __future__ import annotations

from rows import TESTS, TRAIN, Row, of

# What a user would lose, or be trained on, without an error.
KINDS: list[Row] = [
    *of(
        f"{TRAIN}output.py",
        f"{TESTS}test_output.py {TESTS}test_damage.py",
        ('glob(f".prefkern-{self.run}-*")', 'glob("*-*")'),
        ("taken = sorted(n for n in names - self.made", "taken = sorted(n for n in names - names"),
        ("fcntl.LOCK_EX)", "fcntl.LOCK_SH)"),
        ("if path.is_symlink() or run_of(path) is None:", "if path.is_symlink():"),
        ("for name in [*sorted(names - set(last)), *last]:", "for name in sorted(names):"),
        ("in own:\n                continue", "or name:\n                continue"),
        ("found[:4]", "found[:0]"),
        ('if mark is not None and mark["run"] != run_of(resume):', "if False:"),
    ),
    *of(
        f"{TRAIN}output.py",
        f"{TESTS}test_output.py::test_checkpoints_of_another_run_are_not_this_runs",
        ("if run_of(p) == self.run]", "]"),
    ),
    *of(
        f"{TRAIN}inputs.py",
        f"{TESTS}test_output.py",
        ("path.is_dir() and path in out.parents", "False"),
        ("if base.exists() else []", "if False else []"),
    ),
    *of(
        f"{TRAIN}seals.py",
        f"{TESTS}test_output.py {TESTS}test_damage.py",
        ("crc = zlib.crc32(block, crc)", "crc = 0"),
        ("if size != files[name][0]:", "if False:"),
    ),
    *of(
        f"{TRAIN}checkpoint.py",
        f"{TESTS}test_output.py {TESTS}test_damage.py",
        ("shutil.rmtree(building, ignore_errors=True)  # a full", "pass  # a full"),
    ),
    *of(
        f"{TRAIN}loop.py",
        f"{TESTS}test_finite.py {TESTS}test_loading.py",
        ("if finite.is_finite(found):", 'if math.isfinite(found["loss"]):'),
        ("if counts.largest_norm == 0.0:", "if False:"),
        ("if counts.step > before.step:", "if False:"),
        ('sources.check_same(saved["contents"], run.config)', "pass"),
    ),
    *of(
        f"{TRAIN}finite.py",
        f"{TESTS}test_finite.py",
        ("not bool(own.isfinite().all())", "False"),
        ("if step == 1:", "if False:"),
        ("values[:: max(1, len(values) // _SAMPLED)].clone()", "values[:9].clone()"),
    ),
    *of(
        f"{TRAIN}models.py",
        f"{TESTS}test_loading.py",
        ('lacking = sorted(found["missing_keys"])', "lacking = []"),
        (
            "return AutoTokenizer.from_pretrained(name, trust_remote_code=False)",
            "return AutoTokenizer.from_pretrained(name)",
        ),
        ('if getattr(settings, "is_encoder_decoder", False):', "if False:"),
        ("if lacking := sorted(wanted - there):", "if lacking := []:"),
        ("if _any_layer(k) in own)", "if False)"),
        ("    if kind not in saved:\n", "    if False:\n"),
    ),
    *of(
        f"{TRAIN}model_files.py",
        f"{TESTS}test_model_files.py",
        ('if lists and not found.get("weight_map")', "if False"),
        ("if p.name in own or", "if p.suffix == '.json' or"),
        ('stored.read(40).startswith(b"version', 'stored.read(40).startswith(b"of'),
    ),
    *of(
        f"{TRAIN}noise.py",
        f"{TESTS}test_noise.py",
        ("nn.Module.train(model, False)", "nn.Module.train(model, mode)"),
        ("            module.training = True\n", "            pass\n"),
        ("        setattr(config, name, value)\n", "        pass\n"),
        ("                setattr(config, name, 0.0)\n", "                pass\n"),
    ),
    *of(
        f"{TRAIN}data/unread.py",
        f"{TESTS}data/test_unread.py",
        ("if name in self.read:", "if True:"),
        ('and not _asks(data.get("chosen"))', "and False"),
        ("any(_holds_media(str(key), item) for key, item in value.items())", "False"),
        ("bool(is_named or _FILE.fullmatch(value))", "bool(is_named)"),
    ),
    *of(
        f"{TRAIN}data/rendered.py",
        f"{TESTS}data/test_unread.py",
        ("lost = _same(text, render, probe)", "lost = False"),
        ("not any(name in text for name in names)", "False"),
        ("        if names:\n", "        if False:\n"),
    ),
    *of(
        "prefkern/prep/messages.py",
        f"{TESTS}data/test_unread.py",
        (
            "as_json(v) for k, v in value.items() if v is not None}",
            "as_json(v) for k, v in value.items()}",
        ),
        ("if isinstance(arguments, str) and", "if False and"),
        ('message["content"] = ""', 'message["content"] = "None"'),
    ),
    *of(
        f"{TRAIN}data/unread.py",
        f"{TESTS}data/test_other_formats.py",
        ("if not scored and _one_each(value, data):", "if False:"),
        ("and len(value) == len(answers)", ""),
    ),
    *of(
        f"{TRAIN}recipes/rounds.py",
        f"{TESTS}recipes/online/test_rounds.py",
        (
            "rows = [under_read_names(row, renamed) for row in _rows(config)]",
            "rows = _rows(config)",
        ),
        ("beside_prompts(named, known)", "beside_prompts([], known)"),
    ),
    *of(
        f"{TRAIN}data/rows.py",
        f"{TESTS}data/test_other_formats.py",
        ('all(m["role"] in _ASKS for m in response)', "False"),
    ),
    *of(
        f"{TRAIN}data/encode.py",
        f"{TESTS}data/test_other_formats.py",
        ("if ended or any(", "if any("),
    ),
    *of(
        "prefkern/prep/messages.py",
        f"{TESTS}data/test_formats.py",
        ("return int(value)", "return value"),
    ),
    *of(
        f"{TRAIN}data/encode.py",
        f"{TESTS}recipes/online/test_sampling.py",
        ("return self._begun([ids], row)[0]", "return ids"),
    ),
    *of(
        "prefkern/integrations/verify.py",
        f"{TESTS}test_loading.py",
        ("torch.where(_last(ids), (ids + 1) % vocabulary, ids)", "ids"),
    ),
    *of(
        "prefkern/losses/lists.py",
        "tests/losses/test_label_ranges.py",
        ("below = self.relevance < 0", "below = self.relevance < -1e9"),
    ),
]

MUTANTS: list[Row] = KINDS
