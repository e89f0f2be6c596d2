"""The names of every number that a fold, a finish and a gradient exchange, in the order they lie.

Tuples of strings alone: setup.py writes them into a C++ header and the Triton kernels take their
positions from here, so a name has one place. x = z - max of its own model over the summed range
(max counts as 0 where it is -inf), e = exp(x); er, xr the reference's, xa the third head's. A term
with e = 0 is 0 whatever it multiplies.
"""

# Sums of the first sweep over a range of the vocabulary, relative to that range's own maxima.
#   max, sum: of z, and sum e             round_: the same of logits rounded to the working dtype
#   ref_cross: sum er (xr - x)            pol_cross: sum e (x - xr)
#   x: sum e x      sq: sum e e           z_sum, z_count: finite logits
#   top: column of the first largest logit, counted from the range's first
#   alpha_, renyi_, mix_: log-sum-exp of x + a (xr - x); x for a = 0, xr for a = 1, and -inf where
#       that is not a number
#   adv: sum e A (given values), or sum e (xa - xr) with a third head
FIELDS = (
    "max", "sum", "round_max", "round_sum",
    "ref_max", "ref_sum", "ref_cross", "pol_cross",
    "x", "sq", "z_sum", "z_count", "top",
    "alpha_max", "alpha_sum", "renyi_max", "renyi_sum", "mix_max", "mix_sum",
    "adv", "aux_max", "aux_sum",
)  # fmt: skip
# A fold kernel may stop after the first few fields where a call reads no others.
SMALL_ONE_MODEL = 4
SMALL_TWO_MODEL = 8

# Numbers at single columns, plain sums over ranges that each column lies in once: the target's
# logit in both models, and sum_k q_k z_k over a sparse teacher.
AT = ("zy", "ref_zy", "taught")

# Sums of the second sweep, of p = exp(z - lse), r = exp(zr - ref_lse):
#   kl_ref: r (log r - log m)   kl_pol: p (log p - log m)   m = b r + (1-b) p
#   tv: |p - r|     tv_mean: p sign(p - r)
#   top_kl: r (log r - log p) over the top set      rest_ref, rest_pol: r, p outside it
SECOND = ("kl_ref", "kl_pol", "tv", "tv_mean", "top_kl", "rest_ref", "rest_pol")

# Row constants of the second sweep: both normalisers in two parts (high + low loses nothing of a
# large one), and the top set (`v` is inside if zr > value, or zr == value and v <= index).
NORMS = ("lse", "lse_low", "ref_lse", "ref_lse_low", "top_value", "top_index")

# What a forward hands to its backward, float64; one-model calls keep the first three.
#   jsd_kl: KL(policy || mixture)    teacher: sum_k q_k    lse: of the logits the backward reads
SAVED = (
    "lse", "zy", "teacher",
    "ref_lse", "aux_lse", "jsd_kl", "tv_mean", "rest_ref", "rest_pol", "top_value", "top_index",
    "mix_shift",
)  # fmt: skip
SAVED_ONE_MODEL = 3

# Row constants of the logit gradient, in the fold dtype, dz/dx's constant factor included:
#   d = e 1[v=y] + teach q_v
#     + p (a0 + ent (lp + ent_value) + col (p - col_value) + rkl (lp - lr - rkl_value)
#          + ev (A - ev_value) + tv (sign(p - r) - tv_mean) - jsd (log(m / p) + jsd_kl))
#     + fkl (p - r) + alpha (exp(lp + a (lr - lp)) - p)
#     + renyi (exp(lp + a (lr - lp) - renyi_shift) - p)
#     + mix (exp(lp + b (lr - lp) - mix_shift) - p)
#     + bkl (p - (r inside the top set, p bkl_ratio outside))
# A = given values, or (za - aux_lse) - lr. A term whose coefficient is 0 must not be formed (it may
# be infinite), and p = 0 makes the product with the bracket 0.
COEFFICIENTS = (
    "lse", "lse_low", "e", "a0", "ent", "ent_value", "col", "col_value", "teach",
    "ref_lse", "ref_lse_low", "fkl", "rkl", "rkl_value", "ev", "ev_value", "aux_lse", "aux_lse_low",
    "alpha", "renyi", "renyi_shift", "mix", "mix_shift", "jsd", "jsd_kl",
    "tv", "tv_mean", "bkl", "bkl_ratio", "top_value", "top_index",
)  # fmt: skip

# Sums of head rows that the forward of a frozen head keeps, each term times dz/dx's variable part:
# sum e W, sum e x W, sum (e - er) W, sum e (x - xr) W. Two models enter as differences of terms:
# that of two sums would be the rounding of both where the models are close.
FACTORS = ("mass", "log", "gap", "cross")
# Their maxima so far, and where larger ones move them: dp = old - new of the policy and fp = e^dp,
# dr and fr of the reference.
MAXIMA = ("policy", "reference")
SHIFT = ("fp", "fr", "dp", "dr")

# What the record of a call is made of: tensors by name, and numbers.
TENSORS = (
    "hidden", "weight", "bias", "low_in", "low_out",
    "ref_hidden", "ref_weight", "ref_bias", "ref_low_in", "ref_low_out",
    "aux_hidden", "aux_weight", "aux_bias", "aux_low_in", "aux_low_out",
    "logits", "ref_logits",
    "targets", "rows", "values", "values_index",
)  # fmt: skip
NUMBERS = (
    "scale", "softcap", "temperature", "ref_scale", "ref_softcap", "ref_temperature",
    "aux_scale", "aux_softcap", "aux_temperature",
)  # fmt: skip

# Columns of a chunk, counted from the first row of the head at hand; the last may be shorter. A
# unit, one row of one chunk, is what a backward computes or skips.
CHUNK = 1024
