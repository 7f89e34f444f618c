"""The HTTP service around `core`. Knows nothing about training."""
