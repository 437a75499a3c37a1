"""Offline: statistics, bases, placement, rounding, in one streamed pipeline (read `pipeline` first)."""
