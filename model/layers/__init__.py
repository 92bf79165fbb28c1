"""What a transformer layer is made of."""
