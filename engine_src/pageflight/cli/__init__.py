"""The `pageflight` command."""
