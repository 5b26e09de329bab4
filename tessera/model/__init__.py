"""The networks: what a checkpoint says, its weights, its forward pass."""
