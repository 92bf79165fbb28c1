"""The environment of a process that pretends a GPU (`tests/support/pretended_cuda.py`)."""

ENVIRONMENT = {"DS_ACCELERATOR": "cuda", "TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
"""Read when libraries are imported: DeepSpeed takes its CUDA accelerator, Triton's kernels are interpreted, and what
torch.compile would fuse runs as it is."""
