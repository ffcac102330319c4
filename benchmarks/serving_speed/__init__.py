"""What ``benchmarks.serving_load`` measures, and the crowd that it brings, as the load test does."""
