"""The report of a run: what is read, drawn and written."""
