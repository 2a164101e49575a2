"""Decoder definition, families, reading of checkpoint configurations."""
