"""Bases of method files."""
