"""Other engines on random weights of a model's shape, to be timed in the same process as this package's own model."""
