"""The names of methods and tasks, under upstream's path. A method registers itself: see docs/add-a-method.md."""

from ..registry import PeftType, TaskType

__all__ = ["PeftType", "TaskType"]
