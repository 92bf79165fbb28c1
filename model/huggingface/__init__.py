"""Names and shapes of the other world."""
