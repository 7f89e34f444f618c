"""Data, losses, training loop and evaluation of what `service` serves. Knows nothing about HTTP."""
