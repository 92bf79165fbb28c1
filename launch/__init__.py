"""What sets up, checks, starts and supervises runs, on one node and on many.

Users start shell scripts, which are package data, so that an installed copy carries them; modules do the work behind.
"""
