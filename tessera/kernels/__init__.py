"""Tensor code under the backends: moving keys and values into pages and out of them."""
