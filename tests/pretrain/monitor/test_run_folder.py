"""The record in a run's folder, and the refusal of folders that are not ours."""

import pytest

from pretrain.config.run import load_config, parse_config
from pretrain.errors import ConfigError
from pretrain.monitor.run_folder import refuse_foreign_folder, write_run_record

CONFIG = parse_config({"data": {"prefix": "corpus", "tokenizer": "tokenizer.model"}, "train": {"steps": 7}})


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
