"""Mathematics on tensors: the transformer with sharded factors. No files, no optimizer, no loop."""
