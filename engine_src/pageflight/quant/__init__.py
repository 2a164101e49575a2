"""Weight formats: everything becomes one in-memory form."""
