"""Fused forward and backward for factored deltas."""
