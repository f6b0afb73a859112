"""The arithmetic of a cycle's end over lists of tensors, by the fastest implementation each tensor allows."""

from .lists import TensorLists

__all__ = ["TensorLists"]
