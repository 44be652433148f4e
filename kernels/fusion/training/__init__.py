"""The same for a training step."""
