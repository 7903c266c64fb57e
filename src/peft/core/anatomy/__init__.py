"""What a base model is made of: said here once."""
