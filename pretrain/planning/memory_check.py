"""Refuses a run whose weights, gradients and optimizer alone are more than there is, before anything is built."""

import psutil
import torch

from pretrain.config.run import RunConfig
from pretrain.devices import processes_of_machine
from pretrain.errors import ConfigError
from pretrain.planning.memory import plan_memory
from pretrain.planning.step import setup_of


def check_memory(config: RunConfig, processes: int) -> None:
    """ConfigError with the numbers. What is checked is certain and not all: `tools/plan_run.py` plans the rest."""
    plan = plan_memory(config.model, config.initial_ranks(), setup_of(config, processes, torch.cuda.is_available()))
    neighbours = processes_of_machine(processes)
    host = psutil.virtual_memory().total / neighbours
    copy = plan.optimizer if config.checkpoint.background else 0
    states = plan.weights + plan.gradients + plan.optimizer
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        places = [
            (f"of the GPU are free (it has {whole / 1e9:,.1f} GB)", states, free),
            ("here are there", plan.host + copy, host),
        ]
    else:
        places = [
            (f"of the machine's memory, shared by {neighbours} processes, are there", states + plan.host + copy, host)
        ]
    for place, needed, available in places:
        if needed > available:
            raise ConfigError(
                f"weights, gradients and optimizer of the first step take {needed / 1e9:,.1f} GB a process, and "
                f"{available / 1e9:,.1f} GB {place}: raise parallel.tensor, deepspeed.stage or the number of "
                "processes, or lower the model's sizes (tools/plan_run.py shows what fits)"
            )
