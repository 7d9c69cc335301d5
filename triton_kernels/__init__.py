"""Triton kernels. One module or package an operator; the others are shared."""
