"""The paged K/V cache's bookkeeping: block pool, prefix cache, capacity. Ints and ids only, no tensors."""
