"""Shell scripts that set up and start runs: package data, so that an installed copy carries them."""
