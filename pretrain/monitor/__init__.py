"""What people look at while a run goes and after it."""
