"""Writes the table of docs/configs.md: what every installed config needs, by the planner, and how it is launched.

    python tools/documentation/config_table.py          (prints it)
    python tools/documentation/config_table.py --write  (puts it into docs/configs.md)

The machine is assumed, not measured: nodes of eight H100, 40 % of the peak in a dense step, nothing hidden
(`tools/plan_run.py --help`). "Most" is the largest that ranks may grow to.
"""

import argparse
from pathlib import Path

from pretrain.config.run import RunConfig, load_config
from pretrain.disk import replace_text
from pretrain.errors import run_command
from pretrain.planning.fitting import fits, fitting_setup
from pretrain.planning.rank_outlook import outlooks
from pretrain.planning.step import Assumptions, Machine, StepPlan, plan_step
from tools.plan_run import Surroundings

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "configs.md"
BEGIN, END = "<!-- begin: tools/documentation/config_table.py -->", "<!-- end -->"
GPUS_PER_NODE = 8
NODES = {
    **dict.fromkeys(("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl"), 1),
    **{"llama_1b": 2, "llama_7b": 8, "llama_13b": 16, "llama_70b": 64},
}
"""Nodes that every size is planned on, in the order of the table."""
VARIANTS = ("", "_mlp", "_dense")
VOCABULARIES = {"gpt2": 50257, "llama": 32000}
"""What the table assumes; a run has its tokenizer's."""
HEAD = ("config", "GPUs", "parameters: start, most", "GB a GPU: start, most", "tokens", "s a step", "hours", "launch")


def names() -> list[str]:
    """Names of the configs for real use, in the order of the table."""
    wanted = [size + variant for size in NODES for variant in VARIANTS]
    return [name for name in wanted if (ROOT / "configs" / f"{name}.yaml").exists()]


def config_of(name: str) -> RunConfig:
    return load_config(name, [f"model.vocabulary={VOCABULARIES[name.split('_')[0]]}"])


def plans(name: str) -> tuple[RunConfig, Machine, Assumptions, list[StepPlan]]:
    """The steps at the start and at the largest ranks of a run; ConfigError if one does not fit."""
    config = config_of(name)
    surroundings = Surroundings(NODES["_".join(name.split("_")[:2])], GPUS_PER_NODE)
    machine, assumed = surroundings.machine(), surroundings.assumptions(config.train.precision)
    ahead = outlooks(config)
    ahead = ahead[:-1] or ahead  # the last one is the dense model, for comparison
    setup = fitting_setup(config, ahead[-1], machine, assumed)
    found = [plan_step(outlook, setup, machine, assumed) for outlook in (ahead[0], ahead[-1])]
    assert all(fits(step.memory, machine, assumed) for step in found)
    return config, machine, assumed, found


def row(name: str) -> list[str]:
    config, machine, _, steps = plans(name)
    nodes = machine.nodes
    tokens = config.train.steps * config.train.global_batch * config.model.sequence_length
    start = "deepspeed pretrain/train.py" if nodes == 1 else "bash launch/multinode.sh --hostfile hosts"
    return [
        name,
        f"{nodes} x {GPUS_PER_NODE}",
        _both([f"{step.parameters / 1e9:.2f} B" for step in steps]),
        _both([f"{step.memory.total / 1e9:.1f}" for step in steps]),
        f"{tokens / 1e9:,.0f} B",
        _both([f"{step.seconds:.2f}" for step in steps]),
        _both([f"{config.train.steps * step.seconds / 3600:,.1f}" for step in steps]),
        f"`{start} --config {name}`",
    ]


def _both(values: list[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def table() -> str:
    rows = [HEAD, ["---"] * len(HEAD), *map(row, names())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the table of docs/configs.md.")
    parser.add_argument("--write", action="store_true", help="put it into the page")
    arguments = parser.parse_args()
    if not arguments.write:
        print(table())
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    replace_text(PAGE, f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    run_command(main)
