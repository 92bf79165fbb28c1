"""Compares methods of training the same model on the same text, each with its own tuned learning rate.

    python tools/experiments/race.py --config configs/race/small.yaml [--text books.jsonl.xz ...] [--work FOLDER]
    python tools/experiments/race.py --config FILE --list          (what is recorded, what is due, how long it takes)
    python tools/experiments/race.py --config FILE --only dense fixed_48
    python tools/experiments/race.py --config FILE --speed         (step times, on a machine that is idle)
    python tools/experiments/race.py --config FILE --report        (tables and curves, beside the results)

Texts and runs lie in `runs/race/NAME` unless --work says otherwise. Runs go through the ordinary training command, one
after the other or `--jobs` at a time. Interrupted at any time, the same command goes on: finished runs are in the
file of results, a begun one continues from its checkpoint.
"""

import argparse
import signal
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, EspalierError, run_command
from tools.arguments import positive
from tools.experiments.race_plan import RaceConfig, Run, due_runs, load_race, loss_of, run_settings, tuned_rate
from tools.experiments.race_report import write_report
from tools.experiments.race_results import Results
from tools.experiments.race_runs import ROOT, Busy, Interrupted, Runner
from tools.experiments.race_speed import measure
from tools.experiments.race_text import prepare_text

DEFAULT_RESULTS = ROOT / "docs" / "results.json.xz"
_BUSY_SECONDS = 10.0


def main() -> None:
    arguments = _arguments()
    own = Path(__file__).resolve().parents[2]
    if own != ROOT:  # a checkout beside an installed one
        raise ConfigError(f"this race would train with the code in {ROOT}: set PYTHONPATH={own}")
    race = load_race(arguments.config)
    unknown = [name for name in arguments.only if name not in race.methods]
    if unknown:
        raise ConfigError(f"--only names {unknown[0]}, which is no method: give some of {', '.join(race.methods)}")
    results = Results(arguments.results)
    refuse_changed_methods(race, results.read()["runs"])
    if arguments.list:
        print(overview(race, results.read()["runs"]))
        return
    if arguments.report:
        write_report(race, results)
        return
    work = (arguments.work or ROOT / "runs" / "race" / arguments.config.stem).absolute()
    runner = Runner(work, prepare_text(race.text, arguments.text or race.text.files, work))
    stop_on_signals(runner)
    if arguments.speed:
        measure(race, results, runner)
    else:
        run_all(race, results, runner, jobs=arguments.jobs, only=arguments.only)


def refuse_changed_methods(race: RaceConfig, records: Mapping[str, Mapping[str, Any]]) -> None:
    """ConfigError if a recorded run had other settings than its method has now."""
    for key, record in records.items():
        if record["method"] not in race.methods:
            continue
        run = Run(record["method"], record["learning_rate"], record["seed"], record["steps"])
        known = run.steps in (race.full_steps(run.method), race.short_steps(run.method))
        if known and _learned_by(record["settings"]) != _learned_by(run_settings(race, run)):
            raise ConfigError(
                f"{key} was run with other settings than method {run.method} has now: give the changed method another "
                "name, or remove its runs from the results"
            )


def _learned_by(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings of a run's parts without those of its checkpoints, which change no figure."""
    return [{name: section for name, section in part.items() if name != "checkpoint"} for part in settings]


def run_all(race: RaceConfig, results: Results, runner: Runner, *, jobs: int, only: Sequence[str]) -> None:
    """Runs everything that is due, and what becomes due by it.

    A run that fails does not stop the others; EspalierError at the end says which.
    """
    working: dict[Future[dict[str, Any]], Run] = {}
    busy: set[Run] = set()
    failed: dict[Run, EspalierError] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while not runner.stop.is_set():
            records = results.read()["runs"]
            due = [run for run in due_runs(race, records) if (not only or run.method in only) and run not in failed]
            if not due and not working:
                break
            for run in due:
                if len(working) < jobs and run not in {*working.values(), *busy}:
                    print(f"{run.key}: begins; {len(due)} due, log in {runner.folder(run.key)}", flush=True)
                    working[pool.submit(runner.execute, race, run)] = run
            if not working:
                runner.stop.wait(_BUSY_SECONDS)  # all that is due is in the hands of another race
            busy.clear()
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                run = working.pop(future)
                try:
                    record = future.result()
                except Busy:
                    busy.add(run)
                    print(f"{run.key}: another race is at work on it", flush=True)
                except EspalierError as error:
                    failed[run] = error
                    print(f"{run.key}: failed: {error}", flush=True)
                except Interrupted:
                    print(f"{run.key}: interrupted", flush=True)
                else:
                    results.add("runs", run.key, record)
                    print(f"{run.key}: {_said(record)}", flush=True)
    if runner.stop.is_set():
        raise KeyboardInterrupt
    if failed:
        raise EspalierError(f"{len(failed)} runs failed; the last one: {list(failed.values())[-1]}")
    print("everything is recorded")


def stop_on_signals(runner: Runner) -> None:
    """The first signal ends the training that is at work; nothing of it is recorded."""

    def stop(number: int, frame: object) -> None:
        runner.stop.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _said(record: Mapping[str, Any]) -> str:
    if record["diverged"]:
        return "diverged"
    return f"validation loss {loss_of(record):.4f}, {record['step_seconds']:.3f} s a step"


def overview(race: RaceConfig, records: Mapping[str, Mapping[str, Any]]) -> str:
    """What is recorded, what is due, and what will become due at least, with the time it should take."""
    lines = [f"done   {key}: {_said(record)}" for key, record in records.items() if record["method"] in race.methods]
    seconds = 0.0

    def pending(word: str, name: str, method: str, steps: int) -> None:
        nonlocal seconds
        step_seconds = _step_seconds(method, records)
        seconds += steps * (step_seconds or 0.0)
        guess = "no figure yet" if step_seconds is None else f"about {steps * step_seconds / 60.0:.0f} min"
        lines.append(f"{word:<6} {name}: {guess}")

    for run in due_runs(race, records):
        pending("due", run.key, run.method, run.steps)
    for name, method in race.methods.items():
        if tuned_rate(race, name, records) is None:
            runs, steps = len(method.seeds), race.full_steps(name)
            pending("later", f"{name}, {runs} of {steps} steps", name, runs * steps)
    return "\n".join([*lines, f"still about {seconds / 3600.0:.1f} h with one run at a time"])


def _step_seconds(method: str, records: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Seconds a step, from runs of this method or else of any."""
    known = [(record["method"], record["step_seconds"]) for record in records.values() if record["step_seconds"]]
    own = [seconds for name, seconds in known if name == method]
    found = own or [seconds for _, seconds in known]
    return statistics.median(found) if found else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares methods of training the same model on the same text.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the race")
    parser.add_argument("--text", nargs="+", default=[], help="files of the text, needed once (text.files)")
    parser.add_argument("--work", type=Path, help="folder for texts and runs (runs/race/NAME)")
    parser.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="raw figures (docs/results.json.xz)")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="run these methods alone")
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--list", action="store_true", help="show what is recorded and what is due, run nothing")
    action.add_argument("--speed", action="store_true", help="measure step times, on a machine that is idle")
    action.add_argument("--report", action="store_true", help="write tables and curves beside the results")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
