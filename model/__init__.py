"""Mathematics on tensors: the transformer with sharded factors. No files, no optimizer, no loop."""

import warnings

# What our dependencies say at import or at every call, and that a user of this package can do nothing about:
# megatron-core 0.16.1 misses optional packages it does not need here; torch 2.13 renames collectives whose old names
# torch 2.10 needs.
for _message in (
    "Apex is not installed",
    "Transformer Engine and Apex are not installed",
    r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
):
    warnings.filterwarnings("ignore", message=_message)
