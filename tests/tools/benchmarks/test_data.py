"""The data benchmark: one short run of it, on a few files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.benchmarks.data import verdicts

ROOT = Path(__file__).resolve().parents[3]


def rows(loader: float, preprocess: float) -> list[dict[str, object]]:
    return [
        {"name": "sentencepiece alone", "tokens_per_second": 1000.0},
        {"name": "preprocess_corpus", "tokens_per_second": preprocess},
        {"name": "loader", "median_seconds": loader},
        {"name": "training step", "median_seconds": 2.0},
    ]


@pytest.mark.parametrize(
    ("loader", "preprocess", "words"), [(0.02, 900.0, ["met", "met"]), (0.03, 899.0, ["missed"] * 2)]
)
def test_targets(loader: float, preprocess: float, words: list[str]) -> None:
    assert [line.rpartition(" ")[2] for line in verdicts(rows(loader, preprocess))] == words


@pytest.mark.slow
def test_tool_times_tokenizer_and_loader(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for module in ("argparse", "ast", "dis", "inspect"):
        source = Path(__import__(module).__file__ or "")
        (texts / source.name).write_bytes(source.read_bytes())
    sizes = ["--layers", "1", "--hidden", "32", "--heads", "2", "--sequence", "16", "--vocabulary", "600"]
    flags = ["--input", str(texts), *sizes, "--repeats", "2", "--json", str(tmp_path / "data.json")]
    command = [sys.executable, str(ROOT / "tools" / "benchmarks" / "data.py"), *flags]
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "data.json").read_text())
    tokens = {row["name"]: row["tokens"] for row in facts["rows"]}
    assert tokens["Tokenizer.encode"] == tokens["preprocess_corpus"]
    assert tokens["sentencepiece alone"] > 10_000
    assert tokens["loader"] == tokens["training step"] == 4 * 16
    assert all(row["median_seconds"] > 0.0 for row in facts["rows"])
    assert "of sentencepiece alone" in done.stdout
