"""Pure mathematics: tensors in, tensors out. Knows no configs, sites, methods or layers."""
