"""PeftModel, its tuner, and the functions that people call."""

from . import task_models as task_models  # it fills the table by which PeftModel finds the class of a task
