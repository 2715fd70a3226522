"""What every stage needs of Lightning: its base class, the Trainer it runs on, progress, stopping, what is kept."""
