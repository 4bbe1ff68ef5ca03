"""Networks as files that are mapped and in which nothing is executed."""
