"""Putting adapters into a model, and taking them out."""
