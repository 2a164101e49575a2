"""From logits to token ids: adjustments, filters and reproducible random draws, on numpy alone."""
