"""One file per kind of base layer."""
