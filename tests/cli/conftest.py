"""Small models and a runner of commands, for the tests of this folder."""

from tests.helpers.small_models import home, peft

__all__ = ["home", "peft"]
