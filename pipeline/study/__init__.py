"""Which layer would have been best, and who finds it: trial edits at every block, and selectors beside them."""
