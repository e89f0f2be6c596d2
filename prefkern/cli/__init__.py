"""The commands of `prefkern`."""
