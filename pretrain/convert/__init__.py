"""Converts models from and to other forms: consolidated folders, imports, exports."""
