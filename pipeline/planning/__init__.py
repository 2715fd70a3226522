"""What a device needs for a model of which only the config is there."""
