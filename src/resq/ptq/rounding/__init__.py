"""Roundings: how real weights become integers."""
