"""Triton kernels; nothing here knows of models or files."""
