"""The packed checkpoint: a strict versioned manifest and plain safetensors files (docs/checkpoint.md)."""
