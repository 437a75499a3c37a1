"""Roundings: how real weights become integers."""

# Rows of a weight that are rounded at once, always cut alike: what a row becomes may depend, in last digits of sums, on
# how many are rounded with it. A block of 128 columns then takes 0.5 MB in float64 and stays in a core's second cache;
# with more rows GPTQ of [2048, 8192] is no faster, and fewer processes can share it.
ROWS = 512
