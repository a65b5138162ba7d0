"""Benchmarks the engine on this machine: kernels, strategies, storage, start."""
