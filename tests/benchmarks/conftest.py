import bench_package  # noqa: F401
