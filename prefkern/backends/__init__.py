"""Who computes an op: the contract, the choice, and one module or folder per backend.

A backend is a module with the functions of `contract.Backend`; `choice.select_backend` names the
one that serves a call. `cpu` and `cuda` load compiled libraries, `prefkern.kernels` holds Triton's,
`eager` is plain PyTorch, and `tiled` is the sweep over tiles that both GPU backends share.
"""
