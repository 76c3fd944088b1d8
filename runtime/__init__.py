"""What every script shares: configuration, random draws, checkpoints, the training loop."""
