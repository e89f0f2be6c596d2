"""Triton kernels, installed as `prefkern.kernels`."""

# The folder sits in the repository root under a name that another distribution owns. Started from
# the root, `import kernels` would find this folder instead; failing here makes a caller that probes
# with try/except see "not installed", which is the truth.
if __name__ == "kernels":
    raise ImportError(
        "this `kernels` folder holds the sources of prefkern.kernels and is not the package "
        "`kernels`; import prefkern.kernels (after `pip install -e .`), or start Python outside "
        "prefkern's repository root to import the other package."
    )
