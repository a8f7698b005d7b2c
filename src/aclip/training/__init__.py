"""What surrounds a training step: schedule, optimizer, processes, checkpoints, non-finite steps, signals, progress."""
