"""Triton's Python backend: the only importer of triton_python_backend_utils."""
