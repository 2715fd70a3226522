"""The language model: loading, the map of its blocks, running parts of it, generation."""
