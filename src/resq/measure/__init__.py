"""Numbers about a checkpoint: perplexity, true bits, rows behind every figure in the documents."""
