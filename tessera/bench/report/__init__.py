"""From rows to a page: the verdict in words, figures, what ran and its proof, caveats, how to repeat."""
