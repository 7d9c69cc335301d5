"""The readable PyTorch reference of every operator: it defines the truth."""
