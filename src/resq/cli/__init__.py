"""The command `resq`: parse, call, print."""

# Commands register themselves, and help lists them in this order.
# isort: off
from resq.cli import plan, quantize, statistics, evaluate, compare, run, verify  # noqa: F401
from resq.cli.app import RECIPE_NAMES, app, main

__all__ = ["RECIPE_NAMES", "app", "main"]
