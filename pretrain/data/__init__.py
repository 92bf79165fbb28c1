"""The text of a run: from files of token ids to batches."""
