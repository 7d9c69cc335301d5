"""PyTorch operators: wrappers, backend choice, fakes and autograd. One file an operator."""
