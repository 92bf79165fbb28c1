"""Trains a model whose ranks grow.

    deepspeed pretrain/train.py --config configs/quickstart.yaml data.prefix=corpus data.tokenizer=tokenizer.model
    deepspeed --num_gpus 2 pretrain/train.py --config FILE parallel.tensor=2     (without a GPU: two CPU processes)
    deepspeed --hostfile hosts pretrain/train.py --config FILE deepspeed.stage=2
    python pretrain/train.py --config FILE --print-config                        (shows the settings, trains nothing)

Settings are `section.key=value`, laid over the file in order. A run folder that holds a checkpoint is continued from
its newest one, by itself; a run that is complete is left as it is.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch.distributed as dist

from model.process_groups import initialize_process_groups
from pretrain.checkpoint_reader import CheckpointReader, step_folders
from pretrain.config import RunConfig, check_same_architecture, load_config, print_config
from pretrain.corpus import Corpus, open_corpus
from pretrain.errors import CheckpointError, EspalierError, run_command
from pretrain.initial_values import check_ranks, check_same_start, check_start
from pretrain.monitor import Monitor
from pretrain.objective import corpus_for, mask_token
from pretrain.processes import check_precision, is_first_process, joined_processes, together
from pretrain.progress import samples_of_the_run
from pretrain.run_folder import refuse_foreign_folder, write_run_record
from pretrain.summary import summarize
from pretrain.tokenizer import Tokenizer
from pretrain.trainer import Trainer, validation_samples


def train(run: Trainer, monitor: Monitor, checkpoints: Path) -> None:
    """The loop: what happens in a step, and in which order."""
    train, checkpoint, state = run.config.train, run.config.checkpoint, run.state
    loss, validation, saved = float("nan"), None, None
    while state.step < train.steps:
        decision = run.decide_if_due()
        if decision is not None:
            monitor.decision(state.step, decision.answer.seconds, decision.answer.flops)
        if decision is not None and decision.growth is not None:
            growth = decision.growth
            monitor.augmentation(growth.step, growth.before, growth.after, growth.seconds)

        metrics = run.train_step()
        monitor.train_step(state.step, metrics)
        loss = metrics.lm_loss

        if run.corpus.validation is not None and run.validates_after(state.step):
            validation = run.validate()
            monitor.validation(state.step, validation.lm_loss, validation.bits_per_byte, validation.accuracy)
            monitor.spectra(state.step, run.spectra())
        if run.tracker is not None and run.validates_after(state.step):
            monitor.tracking(state.step, run.track(run.tracker))
        if state.step == train.steps or _due(state.step, checkpoint.every):
            saved = run.save(checkpoints)
            monitor.event("checkpoint", state.step, folder=str(saved))

    history = [asdict(record) for record in state.growth]
    monitor.summary(
        summarize(
            run.config,
            run.model.ranks(),
            history,
            step=state.step,
            consumed_samples=state.consumed_samples,
            lm_loss=loss,
            validation_loss=None if validation is None else validation.lm_loss,
            accuracy=None if validation is None else validation.accuracy,
            skipped_steps=state.skipped_steps,
            checkpoint=saved,
        )
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def run_training(config: RunConfig, processes: int) -> Trainer | None:
    """Everything between the command line and the loop, and the loop; all processes call it. None: nothing was left to
    do."""
    layout = config.layout(processes)
    folder = Path(config.run.folder)
    checkpoints, cache = folder / "checkpoints", Path(config.data.cache or folder / "cache")
    together(lambda: refuse_foreign_folder(folder, (config.data.prefix, config.data.tokenizer, str(cache))))
    tokenizer = together(lambda: Tokenizer(config.data.tokenizer))
    if config.train.objective == "mlm":
        together(lambda: mask_token(tokenizer))  # nothing is written for a run that could not begin
    config = config.with_vocabulary(tokenizer.vocabulary)
    config.layout(processes)  # once more: only now is the vocabulary known
    initialize_process_groups(config.parallel.tensor)
    reader = _open_newest(checkpoints, config)
    if reader is not None and reader.step >= config.train.steps:
        if is_first_process():
            print(f"{folder} is complete at step {reader.step}; raise train.steps to go on")
        return None
    together(lambda: _check_origin(reader, config, tokenizer))
    corpus = open_corpus(
        config.data,
        config.model,
        training_samples=samples_of_the_run(config, *_progress(reader)),
        validation_samples=validation_samples(config, layout),
        seed=config.run.seed,
        cache=cache,
    )
    together(lambda: _check_same_samples(reader, config, corpus))
    corpus = corpus_for(config.train, corpus, config.run.seed)
    together(lambda: write_run_record(folder, config) if is_first_process() else None)
    run = Trainer(config, layout, corpus, reader)
    monitor = Monitor(
        folder,
        config,
        run.model.ranks(),
        active=is_first_process(),
        processes=processes,
        resumed_step=run.state.step,
        growth=[asdict(record) for record in run.state.growth],
    )
    if reader is not None:
        monitor.event("resume", run.state.step, checkpoint=str(reader.folder))
    elif config.rank.policy == "explained_ratio":
        monitor.event("null", 0, mean_rank_if_never_trained=run.mean_untrained_rank())
    try:
        train(run, monitor, checkpoints)
    except EspalierError as error:
        monitor.event("fault", run.state.step, error=str(error))
        raise
    finally:
        monitor.close()
    return run


def _open_newest(checkpoints: Path, config: RunConfig) -> CheckpointReader | None:
    """The newest whole checkpoint, the same on all processes, if it is of this architecture; None in a new run.

    A damaged one is passed over with a warning. CheckpointError if there are checkpoints, and none is whole: a run
    never starts over by itself.
    """
    folders = [step_folders(checkpoints)]
    dist.broadcast_object_list(folders, src=0)
    errors = []
    for folder in folders[0]:
        try:
            reader = together(partial(_verified, folder))
        except CheckpointError as error:
            errors.append(error)
            if is_first_process():
                print(f"warning: {error}; trying the one before", file=sys.stderr)
            continue
        together(partial(check_same_architecture, reader.state["model"], config))
        return reader
    if errors:
        raise errors[0]
    return None


def _verified(folder: Path) -> CheckpointReader:
    """The checkpoint, with this process's share of its files read and compared with their checksums."""
    reader = CheckpointReader(folder)
    reader.verify(dist.get_rank(), dist.get_world_size())
    return reader


def _check_origin(reader: CheckpointReader | None, config: RunConfig, tokenizer: Tokenizer) -> None:
    """What a new run starts from, or what a continued one has come to, must suit its settings."""
    if reader is None:
        check_start(config, tokenizer)
    else:
        check_ranks(config, reader.state["ranks"], str(reader.folder))
        check_same_start(reader.state["config"], config)


def _progress(reader: CheckpointReader | None) -> tuple[int, int]:
    """Steps taken and sequences consumed when the run begins."""
    return (0, 0) if reader is None else (reader.step, int(reader.state["train"]["consumed_samples"]))


def _check_same_samples(reader: CheckpointReader | None, config: RunConfig, corpus: Corpus) -> None:
    """Consumed samples mean something only in the same text, split and shuffled in the same way."""
    if reader is None:
        return
    if reader.state["corpus"] != corpus.fingerprint:
        raise CheckpointError(
            f"{reader.folder} was trained on another corpus or tokenizer than data.prefix names now: "
            "use that one, or another run.folder"
        )
    saved = reader.state["config"]
    for name, before, now in (
        ("run.seed", saved["run"]["seed"], config.run.seed),
        ("data.split", saved["data"]["split"], config.data.split),
    ):
        if before != now:
            raise CheckpointError(
                f"{reader.folder} was trained with {name} {before}, and now it is {now}, which changes the order of "
                f"the samples: set {name} back, or use another run.folder"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a model whose ranks grow.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("--print-config", action="store_true", help="show the resolved settings and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print_config(config)
        return
    check_precision(config.train.precision)
    with joined_processes() as processes:
        run_training(config, processes)


if __name__ == "__main__":
    run_command(main)
