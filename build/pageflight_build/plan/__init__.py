"""What a model needs and which GPUs hold it: arithmetic before anything is built. `pageflight plan` shows it."""
