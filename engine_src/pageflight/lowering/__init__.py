"""Lowerings: the one decoder definition turned into something that runs."""
