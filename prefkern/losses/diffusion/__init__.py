"""Losses over prediction errors of diffusion models, reduced per sample by prefkern.error_sum:
(chosen_err, rejected_err, ref_chosen_err, ref_rejected_err, *, ...) -> [P]."""
