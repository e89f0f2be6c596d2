"""What benchmarks/device_check.py runs on a machine with a GPU."""
