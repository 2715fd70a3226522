"""Where to change it: selectors score every block, request by request; the golden profile says what is chosen."""
