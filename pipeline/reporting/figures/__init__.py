"""Figures, all in one look (`look.py`), a file an idea."""
