"""The record of a run, and files of lines that survive kills, resumes and full disks."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pretrain.config.run import load_config, parse_config
from pretrain.errors import ConfigError
from pretrain.monitor.run_folder import JsonLines, refuse_foreign_folder, replace_text, write_run_record

CONFIG = parse_config({"data": {"prefix": "corpus", "tokenizer": "tokenizer.model"}, "train": {"steps": 7}})


@contextmanager
def files_up_to(size_bytes: int) -> Iterator[None]:
    """A real limit on the size of files, which stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_record_of_a_run_is_a_config_that_repeats_it(tmp_path):
    folder = tmp_path / "run"
    write_run_record(folder, CONFIG)
    text = (folder / "config.yaml").read_text()
    assert "# torch 2." in text
    assert "# git " in text
    assert load_config(str(folder / "config.yaml")) == CONFIG
    assert [entry.name for entry in folder.iterdir()] == ["config.yaml"]


def test_own_and_empty_folders_are_fine_and_others_are_refused(tmp_path):
    refuse_foreign_folder(tmp_path / "new")
    folder = tmp_path / "run"
    folder.mkdir()
    refuse_foreign_folder(folder)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty and holds no Espalier run .* set run\.folder"):
        refuse_foreign_folder(folder)
    (folder / "config.yaml").write_text("somebody: else\n")
    with pytest.raises(ConfigError, match="is not empty"):
        refuse_foreign_folder(folder)
    write_run_record(folder, CONFIG)
    refuse_foreign_folder(folder)


def test_the_runs_own_corpus_may_lie_in_a_new_folder(tmp_path):
    for name in ("corpus.bin", "corpus.idx", "tokenizer.model"):
        (tmp_path / name).touch()
    expected = [str(tmp_path / "corpus"), str(tmp_path / "tokenizer.model")]
    refuse_foreign_folder(tmp_path, expected)
    with pytest.raises(ConfigError, match="is not empty"):
        refuse_foreign_folder(tmp_path, expected[:1])


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is a file"):
        refuse_foreign_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot be written .*: set run\.folder"):
        write_run_record(tmp_path / "run", CONFIG)


def test_a_failed_replacement_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_lines_of_later_steps_and_a_torn_one_are_cut(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.cut(5)
    for step in (1, 5, 10):
        lines.append({"step": step})
    with lines.path.open("a") as file:
        file.write('{"step": 1')
    lines.cut(5)
    assert lines.path.read_text() == '{"step": 1}\n{"step": 5}\n'
    lines.cut(None)
    assert [record["step"] for record in lines.read()] == [1, 5]


def test_numbers_that_json_lacks_become_null(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"loss": float("nan"), "inner": {"norm": [float("inf"), 1.0]}})
    assert json.loads(lines.path.read_text()) == {"loss": None, "inner": {"norm": [None, 1.0]}}


def test_a_line_that_did_not_fit_leaves_the_file_as_it_was(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1})
    with files_up_to(40), pytest.raises(OSError, match="took only part of a line"):
        lines.append({"step": 2, "text": 100 * "x"})
    assert lines.path.read_text() == '{"step": 1}\n'
