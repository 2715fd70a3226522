"""The change: one file a kind of edit, all ending in a WeightUpdate."""
