"""One step on one device: inputs, model, logits, sampled tokens."""
