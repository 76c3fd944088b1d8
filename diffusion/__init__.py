"""Gaussian diffusion as DiT uses it: noise schedules, losses, samplers, guidance. Knows tensors and timesteps, no networks."""
