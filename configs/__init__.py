"""Run settings as YAML files, and DeepSpeed JSON files under `deepspeed/`: package data, found by their bare names."""
