"""Triton kernels of learned-query attention. Imported where they are used: triton is optional."""
