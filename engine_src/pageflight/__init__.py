"""pageflight: a Hugging Face checkpoint becomes a Triton model repository that serves it."""

__version__ = "0.1.0"
