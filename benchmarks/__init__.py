"""Benchmarks: one file per question, and the world they measure on."""
