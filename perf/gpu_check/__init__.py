"""What only a GPU can answer: whether the kernels are right there, and how near they come to what the card can do."""
