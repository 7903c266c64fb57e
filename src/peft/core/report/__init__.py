"""What is in a model, in words and numbers."""
