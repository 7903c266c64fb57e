"""Values come in: from files, from other adapters."""
