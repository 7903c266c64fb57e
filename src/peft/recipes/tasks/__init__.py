"""What rows are to a model: one file for each family of tasks."""
