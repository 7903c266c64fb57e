"""Loops that train an adapter."""
