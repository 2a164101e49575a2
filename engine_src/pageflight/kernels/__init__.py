"""Kernels in the Triton language: what a GPU runs between and around matrix products."""
