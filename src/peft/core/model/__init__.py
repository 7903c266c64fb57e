"""PeftModel, its tuner, and the functions that people call."""
