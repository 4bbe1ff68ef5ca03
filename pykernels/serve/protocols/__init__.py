"""One file a protocol, and what several of them share: tensors.py, v2.py (messages of the Open Inference Protocol)."""
