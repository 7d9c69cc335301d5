"""Triton kernels. One file an operator."""
