"""Triton kernels of the local self-attention. Imported where they are used: triton is optional."""
