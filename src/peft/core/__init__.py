"""How adapters live in a model: the only code that knows both methods and layer kinds."""
