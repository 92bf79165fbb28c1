"""What a run is: its settings, where they are read from, and how it is laid over processes."""
