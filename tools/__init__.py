"""Command-line tools around a run: tokenizer and corpus before it, checkpoints and exports after it."""
