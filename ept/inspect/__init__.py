"""Looking into an adapter, a training step's memory, and an installation."""
