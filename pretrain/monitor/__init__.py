"""Everything that a run shows to people, during the run and after it."""
