"""Upstream's names as views of this library's objects."""
