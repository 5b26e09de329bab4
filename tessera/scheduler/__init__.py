"""Which sequence computes how many tokens next, and where its keys and values lie. Host code only."""
