"""``pykernels.optimize(precision="auto")``: int8 or fp32 for each step, the quickest within a budget."""
