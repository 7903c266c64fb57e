"""Small models, for the tests of this folder."""

from small_models import home

__all__ = ["home"]
