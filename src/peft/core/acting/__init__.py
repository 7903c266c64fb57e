"""Who acts on which rows and tokens."""
