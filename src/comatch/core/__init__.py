"""Pure functions on tensors: masks, packing, batches, positions and pooling."""
