"""Trains a model whose ranks grow.

    deepspeed pretrain/train.py --config configs/quickstart.yaml data.prefix=corpus data.tokenizer=tokenizer.model
    deepspeed --num_gpus 2 pretrain/train.py --config FILE parallel.tensor=2 train.precision=fp32     (two CPU processes)
    deepspeed --hostfile hosts pretrain/train.py --config FILE deepspeed.stage=2
    python pretrain/train.py --config FILE --print-config                                             (shows, trains nothing)

Settings are `section.key=value`, laid over the file in order. A run folder that holds a checkpoint is continued from the newest
one, by itself; one that is complete is left as it is.
"""

import argparse
from pathlib import Path

import torch.distributed as dist

from model.process_groups import initialize_process_groups
from pretrain.checkpoint_reader import CheckpointReader, find_checkpoint
from pretrain.config import RunConfig, check_same_architecture, load_config, print_config
from pretrain.corpus import Corpus, open_corpus
from pretrain.errors import CheckpointError, ConfigError, EspalierError, run_command
from pretrain.layout import Layout
from pretrain.monitor import Monitor
from pretrain.processes import is_first_process, joined_processes, together
from pretrain.schedule import samples_before
from pretrain.tokenizer import Tokenizer
from pretrain.trainer import Trainer, validation_micro_steps


def train(run: Trainer, corpus: Corpus, monitor: Monitor, checkpoints: Path) -> None:
    """The loop."""
    train, checkpoint, state = run.config.train, run.config.checkpoint, run.state
    while state.step < train.steps:
        growth = run.augment_if_due()
        if growth is not None:
            monitor.growth(growth, run.model.ranks(), run.spectra())

        monitor.train_step(state.step, run.train_step(corpus))

        last = state.step == train.steps
        if last or (train.validate_every and state.step % train.validate_every == 0):
            monitor.validation(state.step, run.validate(corpus))
            monitor.spectra(state.step, run.spectra())
        if last or (checkpoint.every and state.step % checkpoint.every == 0):
            monitor.checkpoint(state.step, run.save(checkpoints, Path(run.config.data.tokenizer)))
