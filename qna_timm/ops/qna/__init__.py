"""Learned-query attention: `api` has the public functions."""
