"""Passes over the user's data."""
