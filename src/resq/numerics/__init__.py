"""Tensor functions of the method: bands, quantizers, packing, maps, moments. Depends on torch only."""
