"""How methods refuse a site, and the refusals that several of them state."""

from __future__ import annotations

from ..errors import Refusal
from .method import Method
from .site import Site


def refusal(method: type[Method], site: Site, reason: str) -> Refusal:
    """The error that says why `method` cannot change the module at `site`; to be raised."""
    return Refusal(method.peft_type, f"{site.path} ({site.layer})", reason)


def require_channels(method: type[Method], site: Site) -> None:
    """Refuse a site whose output has an unknown number of channels, for methods that act on those."""
    if site.geometry.out == 0:
        raise refusal(method, site, "the number of channels of its output cannot be told from the module")
