"""Architectures as descriptions, the one decoder, and the streamed source of weights."""
