"""Trains a model whose ranks grow.

    deepspeed pretrain/train.py --config configs/quickstart.yaml data.prefix=corpus data.tokenizer=tokenizer.model
    deepspeed --num_gpus 2 pretrain/train.py --config FILE parallel.tensor=2     (without a GPU: two CPU processes)
    deepspeed --hostfile hosts pretrain/train.py --config FILE deepspeed.stage=2
    python pretrain/train.py --config FILE --print-config                        (shows the settings, trains nothing)

Settings are `section.key=value`, laid over the file in order. A run folder that holds a checkpoint is continued from
its newest one, by itself; a run that is complete is left as it is.
"""

import argparse
import gc
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

from model.process_groups import initialize_process_groups
from pretrain.checkpoint.saver import Saver
from pretrain.config.run import RunConfig, load_config
from pretrain.config.setting_list import print_config
from pretrain.data.corpus import open_corpus
from pretrain.data.masked_lm import corpus_for, mask_token
from pretrain.device_settings import collective_timeout
from pretrain.distributed import is_first_process, joined_processes, together
from pretrain.engine.build import release_free_memory, tear_down
from pretrain.engine.deepspeed_config import with_deepspeed_file
from pretrain.errors import EspalierError, NumericalError, StopSignal, agreed, run_command
from pretrain.monitor.monitor import Monitor
from pretrain.monitor.run_folder import LOGS_FOLDER, refuse_foreign_folder, write_run_record
from pretrain.monitor.summary import summarize
from pretrain.planning.fitting import check_memory
from pretrain.resilience import heartbeat
from pretrain.resilience.guard import Guard, RollBack
from pretrain.resilience.run_lock import LOCK_FILE, locked
from pretrain.resilience.signals import Signals
from pretrain.resilience.watchdog import lost_peers_reported, watched
from pretrain.resume import check_origin, check_same_samples, open_newest, progress_of
from pretrain.tokenizer.base import Tokenizer
from pretrain.tokenizer.load import open_tokenizer
from pretrain.trainer import Trainer, validation_samples


def train(trainer: Trainer, monitor: Monitor, guard: Guard, checkpoints: Path) -> None:
    """The loop: what happens in a step, and in which order."""
    train, checkpoint, state = trainer.config.train, trainer.config.checkpoint, trainer.state
    loss, validation = float("nan"), None
    saver = Saver(beside=checkpoint.background, failures=checkpoint.failures, report=monitor.log_record)
    save = partial(saver.save, partial(trainer.begin_checkpoint, checkpoints))
    while state.step < train.steps:
        decision = trainer.decide_if_due()
        if decision is not None:
            monitor.decision(state.step, decision.answer.seconds, decision.answer.flops)
        if decision is not None and decision.growth is not None:
            guard.forget()
            monitor.growth(decision.growth)

        metrics = trainer.train_step(lambda: guard.flags(saver.writing))
        monitor.train_step(state.step, metrics)
        loss = metrics.lm_loss
        try:
            guard.judge(loss, state, monitor.log_record)
        except (RollBack, NumericalError):
            saver.finish()  # a checkpoint from before this step
            raise

        saver.commit_if_written(not trainer.flags.writing)
        if trainer.flags.signal and state.step < train.steps:
            save(state.step, final=True)
            raise guard.stop(trainer.flags.signal, state.step)
        if trainer.corpus.validation and trainer.validates_after(state.step):
            found = trainer.validate()
            validation = next(iter(found.values()))
            monitor.validation(state.step, found)
            monitor.spectra(state.step, trainer.spectra())
        if trainer.tracker is not None and trainer.validates_after(state.step):
            monitor.tracking(state.step, trainer.track(trainer.tracker))
        if state.step == train.steps or _due(state.step, checkpoint.every):
            save(state.step, final=state.step == train.steps)

    monitor.summary(
        summarize(
            trainer.config,
            trainer.model.ranks(),
            state,
            lm_loss=loss,
            validation=validation,
            checkpoint=saver.newest,
        )
    )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def run_training(config: RunConfig, processes: int) -> Trainer | None:
    """Runs or continues the training of `config`; all processes call it. None if the run was complete already."""
    config.parallel_layout(processes)
    folder = Path(config.run.folder)
    own = [
        *config.data.prefixes(),
        config.data.tokenizer,
        *map(str, (_cache(config), folder / LOCK_FILE, folder / LOGS_FOLDER)),
    ]
    together(lambda: refuse_foreign_folder(folder, own))
    tokenizer = together(lambda: open_tokenizer(config.data.tokenizer))
    if config.train.objective == "mlm":
        together(lambda: mask_token(tokenizer))  # checked before anything is written
    config = config.with_vocabulary(tokenizer.vocabulary)
    layout = config.parallel_layout(processes)  # again, now that the vocabulary is known
    config = together(partial(with_deepspeed_file, config, layout))
    together(lambda: check_memory(config, processes))
    initialize_process_groups(config.parallel.tensor, collective_timeout(config.guard.hang_seconds))
    signals, rollback = Signals(), None
    with ExitStack() as stack:
        for context in (locked(folder), signals.caught(), watched(config.guard.hang_seconds), lost_peers_reported()):
            stack.enter_context(context)
        for rollbacks in count():
            try:
                return _run_once(config, processes, tokenizer, signals, rollback)
            except RollBack as error:
                if rollbacks >= config.guard.rollbacks:
                    raise agreed(f"{error.reason}; guard.rollbacks, {config.guard.rollbacks}, are used up") from None
                rollback = error.with_traceback(None)  # the traceback would keep engine and model alive
                gc.collect()
                release_free_memory()
    raise AssertionError("the loop above ends by itself")


def _cache(config: RunConfig) -> Path:
    return Path(config.data.cache or Path(config.run.folder) / "cache")


def _run_once(
    config: RunConfig, processes: int, tokenizer: Tokenizer, signals: Signals, rollback: RollBack | None
) -> Trainer | None:
    """Trains from the newest checkpoint to the end of the run, or until a RollBack.

    `rollback`: the one after which the run begins here again. None if the run was complete already.
    """
    layout, folder = config.parallel_layout(processes), Path(config.run.folder)
    checkpoints = folder / "checkpoints"
    reader = open_newest(checkpoints, config)
    heartbeat.at("resume.opened", 0 if reader is None else reader.step)
    if reader is not None and reader.step >= config.train.steps:
        if is_first_process():
            print(f"{folder} is complete at step {reader.step}; raise train.steps to go on")
        return None
    if rollback is not None and reader is None:
        raise agreed(f"{rollback.reason}; there is no checkpoint to go back to: lower checkpoint.every")
    together(lambda: check_origin(reader, config, tokenizer))
    step, consumed = progress_of(reader)
    consumed = consumed if rollback is None else rollback.consumed_samples
    corpus = open_corpus(
        config.data,
        config.model,
        training_samples=config.samples_at_end(step, consumed),
        validation_samples=validation_samples(config, layout),
        seed=config.run.seed,
        cache=_cache(config),
        tokenizer=tokenizer,
    )
    together(lambda: check_same_samples(reader, config, corpus))
    corpus = corpus_for(config.train, corpus, config.run.seed)
    together(lambda: write_run_record(folder, config) if is_first_process() else None)
    trainer = Trainer(config, layout, corpus, reader)
    if reader is not None:
        reader.close()
    monitor = Monitor(
        folder,
        config,
        trainer.model.ranks(),
        active=is_first_process(),
        processes=processes,
        state=trainer.state,
    )
    if reader is not None:
        monitor.log_record("resume", trainer.state.step, checkpoint=str(reader.folder))
    elif (null := trainer.mean_untrained_rank()) is not None:
        monitor.log_record("null", 0, mean_rank_if_never_trained=null)
    if rollback is not None:
        monitor.log_record("rollback", step, reason=rollback.reason, left_out=trainer.state.leave_out(consumed))
    try:
        train(trainer, monitor, Guard(config.guard, signals), checkpoints)
    except RollBack:
        tear_down(trainer.engine)
        raise
    except EspalierError as error:
        monitor.log_record(
            "stopped" if isinstance(error, StopSignal) else "fault", trainer.state.step, error=str(error)
        )
        raise
    finally:
        trainer.close()
        monitor.close()
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a model whose ranks grow.")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of an installed config")
    parser.add_argument("--print-config", action="store_true", help="show all settings, what each does, and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings laid over the file")
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print_config(config)
        return
    with joined_processes(config) as processes:
        run_training(config, processes)


if __name__ == "__main__":
    run_command(main)
