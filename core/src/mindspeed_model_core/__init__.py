"""Parallelism, fused ops, the training loop, weights and baselines shared by the MindSpeed model packages."""
