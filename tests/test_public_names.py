"""The public names of the package."""

from __future__ import annotations

import pytest

import peft
from peft.core.adapted.layer import Adapted
from tests.helpers.tiny_llama import llama


def test_names_are_not_invented():
    with pytest.raises(AttributeError, match="no attribute"):
        peft.LoraConfg  # noqa: B018
    assert not any(isinstance(m, Adapted) for m in llama().modules())
