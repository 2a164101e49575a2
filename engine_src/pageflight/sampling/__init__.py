"""Choosing tokens from logits: penalties, filters, keyed random numbers, log probabilities."""
