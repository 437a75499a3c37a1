"""One page about a comparison of recipes: what `resq report` writes."""
