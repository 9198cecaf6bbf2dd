"""Triton kernels: the portable path. Imports torch and triton only."""
