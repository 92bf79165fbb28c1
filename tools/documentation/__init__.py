"""Pages and pictures that are made from the code."""
