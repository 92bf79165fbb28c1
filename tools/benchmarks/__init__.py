"""The measurements behind the figures of docs/."""
