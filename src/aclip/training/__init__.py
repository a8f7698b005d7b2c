"""What surrounds a training step: schedule, optimizer, processes, what can go wrong, what is journalled."""
