"""What the server process of `tests/support/fault_runs.py` imports, once for all runs."""

import pretrain.train  # noqa: F401
