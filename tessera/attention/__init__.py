"""Attention: the contract, the backends, and the choice between them."""
