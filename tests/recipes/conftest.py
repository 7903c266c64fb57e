"""Small models, for the tests of this folder."""

from tests.helpers.small_models import home

__all__ = ["home"]
