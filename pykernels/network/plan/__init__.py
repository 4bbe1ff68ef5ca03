"""Networks as plans: emitted, described, tuned. Run by csrc/cpu/plan."""
