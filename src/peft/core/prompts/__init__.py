"""Hooks of the methods whose site is the whole model."""
