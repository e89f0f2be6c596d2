"""Faults of prefkern/diffusion: (name, file, old text, new text, tests of which one must fail)."""

from __future__ import annotations

D = "prefkern/diffusion/"
S = ("tests/diffusion/test_schedule.py",)
P = ("tests/diffusion/test_preference.py",)

MUTANTS = [
    # ---- schedule.py
    (
        "a_velocity_has_the_wrong_sign",
        D + "schedule.py",
        "return (signal * noise - amount * clean).to(clean.dtype)",
        "return (amount * clean - signal * noise).to(clean.dtype)",
        *S,
    ),
    (
        "a_flow_goes_to_the_sample",
        D + "schedule.py",
        "return (noise - clean).to(clean.dtype)",
        "return (clean - noise).to(clean.dtype)",
        *S,
    ),
    (
        "a_flows_noise_forgets_the_signal",
        D + "schedule.py",
        "return x + signal * pred",
        "return x + pred",
        *S,
    ),
    (
        "a_step_takes_all_noise_along",
        D + "schedule.py",
        "(amount.double() ** 2 - _beside(sigma, x) ** 2)",
        "(amount.double() ** 2)",
        *S,
    ),
    (
        "eta_is_squared",
        D + "schedule.py",
        "return eta * amount_to / amount",
        "return eta**2 * amount_to / amount",
        *S,
    ),
    (
        "renoising_adds_the_whole_noise",
        D + "schedule.py",
        "added = (amount_to**2 - kept**2 * amount**2)",
        "added = (amount_to**2)",
        *S,
    ),
    (
        "levels_are_not_checked",
        D + "schedule.py",
        "if low < lowest or high >= len(self):",
        "if low < lowest:",
        *S,
    ),
    # ---- inversion.py
    (
        "a_correction_starts_from_where_it_is",
        D + "inversion.py",
        "eps = total / count if average else found\n            following = _forward(schedule, x, at, to, eps)",
        "eps = total / count if average else found\n            following = _forward(schedule, following, at, to, eps)",
        *S,
    ),
    (
        "corrections_are_left_out",
        D + "inversion.py",
        "for count in range(2, corrections + 2):",
        "for count in range(2, corrections + 1):",
        *S,
    ),
    # ---- preference.py
    (
        "each_side_has_its_own_noise",
        D + "preference.py",
        "noise = torch.randn(draws, *clean[0].shape[1:], dtype=clean[0].dtype, **like)[owners]",
        "noise = torch.randn(len(owners), *clean[0].shape[1:], dtype=clean[0].dtype, **like)",
        *P,
    ),
    (
        "the_reference_keeps_its_adapters",
        D + "preference.py",
        "with evaluating(self.denoiser), adapters_off(self.denoiser):",
        "with evaluating(self.denoiser):",
        *P,
    ),
    (
        "a_policys_dropout_is_left_off",
        D + "reference.py",
        "            module.training = True",
        "            module.training = False",
        *P,
    ),
    (
        "the_rejected_side_takes_the_chosens_caption",
        D + "batches.py",
        "other = self.cond if self.rejected_cond is None else self.rejected_cond",
        "other = self.cond",
        *P,
    ),
    (
        "the_policy_inverts",
        D + "noised.py",
        'denoiser = draw.policy if self.by == "policy" else draw.reference',
        "denoiser = draw.policy",
        *P,
    ),
    # ---- own.py
    (
        "a_verdict_is_not_followed",
        D + "own.py",
        "swapped = (preferred < 0) * len(every)",
        "swapped = (preferred > 0) * len(every)",
        *P,
    ),
    ("branches_keep_every_pair", D + "own.py", "> threshold", "> -2.0", *P),
    # ---- labels.py, guidance.py
    (
        "a_sample_competes_with_itself",
        D + "labels.py",
        ".fill_diagonal_(False)",
        ".fill_diagonal_(True)",
        *P,
    ),
    (
        "guidance_is_scaled_from_the_positive",
        D + "guidance.py",
        "return pushed + self.scale",
        "return self.positive(x, time, cond) + self.scale",
        *P,
    ),
]
