"""Takes the pictures of docs/tensorboard.md: TensorBoard's pages and the report of a run, in a headless Chromium.

    python tools/documentation/screenshots.py --run runs/quickstart --beside runs/dense --output docs/images

Starts TensorBoard on a free port of this machine for as long as it takes. Needs `chromium` (or Google Chrome) on the
PATH.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from pretrain.distributed import free_port
from pretrain.errors import ConfigError, EspalierError, run_command
from tools.run_report.history import RunHistory
from tools.run_report.page import page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_START_SECONDS = 300.0
_SHOT_SECONDS = 300.0


@dataclass(frozen=True)
class Shot:
    """One picture: an address, the size of the window, and how many pixels a point of it gets on a side."""

    name: str
    address: str
    width: int
    height: int
    scale: int = 1


def tensorboard_shots(root: str) -> list[Shot]:
    """The pages that the documentation shows."""
    images = quote("^(rank/map|spectrum/singular_values)$")
    return [
        Shot("tensorboard_charts", f"{root}/#custom_scalars&_smoothingWeight=0", 1500, 770),
        Shot("tensorboard_images", f"{root}/#images&tagFilter={images}", 1140, 500, scale=2),
        Shot("tensorboard_events", f"{root}/#text&tagFilter=growth", 1100, 560),
        Shot("tensorboard_settings", f"{root}/#hparams", 1780, 260),
    ]


def find_browser() -> str:
    """Path of a browser; ConfigError where there is none."""
    found = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        raise ConfigError(f"there is none of {', '.join(BROWSERS)} on the PATH: install one (apt-get install chromium)")
    return found


def take(browser: str, shot: Shot, output: Path) -> None:
    """Writes `output/NAME.png`, in 256 colours; the page gets twenty seconds of its own time to finish."""
    path = output.resolve() / f"{shot.name}.png"
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser, "--headless", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking",
            f"--user-data-dir={profile}", f"--screenshot={path}", f"--window-size={shot.width},{shot.height}",
            "--virtual-time-budget=20000", f"--force-device-scale-factor={shot.scale}",
        ]  # fmt: skip
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # which root cannot have
        answer = subprocess.run(
            [*command, shot.address], capture_output=True, text=True, timeout=_SHOT_SECONDS, check=False
        )
    if answer.returncode or not path.is_file():
        raise EspalierError(f"{browser} took no picture of {shot.address}: {answer.stderr.strip()[-300:]}")
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


@contextmanager
def tensorboard(runs: list[RunHistory]) -> Iterator[str]:
    """The address of a TensorBoard that has read all runs."""
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / "runs"
        shown.mkdir()
        for run in runs:
            (shown / run.name).symlink_to((run.folder / "tensorboard").resolve())
        port = free_port()
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", shown.name, "--host", "127.0.0.1"]
        server = subprocess.Popen(
            [*command, "--port", str(port), "--load_fast", "false"],
            cwd=folder,  # the page shows the folder's name
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            root = f"http://127.0.0.1:{port}"
            _wait_until_read(server, f"{root}/data/runs", [run.name for run in runs])
            yield root
        finally:
            server.terminate()
            server.wait()


def _wait_until_read(server: subprocess.Popen[bytes], address: str, names: list[str]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=10.0) as answer:
                known = answer.read().decode()
        except OSError:  # it does not listen yet
            known = ""
        if all(f'"{name}/by_seconds"' in known for name in names):
            return
        time.sleep(0.5)
    raise EspalierError(f"TensorBoard did not show {', '.join(names)} within {_START_SECONDS:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes the pictures of docs/tensorboard.md.")
    parser.add_argument("--run", type=Path, required=True, help="run folder", metavar="DIR")
    parser.add_argument("--beside", type=Path, required=True, help="another run, drawn beside it", metavar="DIR")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures", metavar="DIR")
    arguments = parser.parse_args()
    browser = find_browser()
    runs = [RunHistory(arguments.run), RunHistory(arguments.beside)]
    if runs[0].name == runs[1].name:
        raise ConfigError(f"--run and --beside are both called {runs[0].name}: rename one of the folders")
    arguments.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        report.write_text(page(*runs), encoding="utf-8")
        take(browser, Shot("report", report.as_uri(), 1200, 2500), arguments.output)
    with tensorboard(runs) as root:
        for shot in tensorboard_shots(root):
            take(browser, shot, arguments.output)
            print(arguments.output / f"{shot.name}.png", flush=True)


if __name__ == "__main__":
    run_command(main)
