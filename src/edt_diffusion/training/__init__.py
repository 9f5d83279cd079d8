"""The training engine: loop, checkpoints, optimizers, EMA, logs."""
