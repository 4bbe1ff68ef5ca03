"""A model as one canonical graph of ATen calls: exported, functional, folded, one spelling an operation."""
