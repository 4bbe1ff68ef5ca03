"""The command `pykernels`."""
