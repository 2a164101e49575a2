"""Measuring a running server from outside: everything here speaks only the wire."""
