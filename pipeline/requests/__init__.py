"""What is to change: edit requests, the layouts they come in, how they become tokens and batches."""
