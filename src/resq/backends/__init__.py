"""Operators over packed tensors: a contract (`backend`), its definition (`reference`), and what is fast."""
