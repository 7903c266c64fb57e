"""The wrapper of one base layer."""
