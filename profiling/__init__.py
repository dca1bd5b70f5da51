"""What kernels cost. ``sass`` counts registers, spills and instructions of compiled kernels."""
