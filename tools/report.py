"""Writes a run's report: one HTML file with its curves, ranks, singular values, events and settings.

    python tools/report.py --run runs/quickstart
    python tools/report.py --run runs/quickstart --beside runs/dense --output quickstart.html

The file needs nothing else, no network and no scripts. It can be written while the run goes on, from another machine
that sees the folder, and again later. `--beside` draws another run, such as the dense one, into the pictures of the
loss.
"""

import argparse
from pathlib import Path

from pretrain.disk import replace_text
from pretrain.errors import run_command
from tools.arguments import output_file
from tools.run_report.history import RunHistory
from tools.run_report.page import page

REPORT_FILE = "report.html"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes a run's report, one HTML file.")
    parser.add_argument("--run", type=Path, required=True, help="run folder", metavar="DIR")
    parser.add_argument("--beside", type=Path, help="another run, drawn beside it", metavar="DIR")
    parser.add_argument("--output", type=output_file, help=f"file to write (DIR/{REPORT_FILE})", metavar="FILE")
    arguments = parser.parse_args()
    run = RunHistory(arguments.run)
    beside = None if arguments.beside is None else RunHistory(arguments.beside)
    output = arguments.output or arguments.run / REPORT_FILE
    replace_text(output, page(run, beside))
    print(output)


if __name__ == "__main__":
    run_command(main)
