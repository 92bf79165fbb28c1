"""One of everything that the product reads, small and whole, for tests that spoil it."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from model.config import ModelConfig, factored_projections
from pretrain.checkpoint.reader import CheckpointReader
from pretrain.convert.consolidated import ConsolidatedModel, write_consolidated
from pretrain.convert.export_marker import DENSE_EXPORT, FACTS_NAME, files_below
from pretrain.convert.huggingface_export import write_dense_export
from pretrain.tokenizer.load import open_tokenizer
from tests.support.checkpoint_cases import edit_manifest, save_model
from tests.support.consolidated_folder import small_tokenizer
from tests.support.huggingface_files import END, byte_level
from tests.support.race_cases import RACE
from tools.corpus.documents import find_files
from tools.experiments.race_results import Results
from tools.preprocess_corpus import Job, preprocess


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`corpus/`, `checkpoints/`, `consolidated/` (in several files), `dense/` (an export), `settings/`, `start/`."""
    world = tmp_path_factory.mktemp("world")
    corpus = world / "corpus"
    corpus.mkdir()
    tokenizer = open_tokenizer(small_tokenizer(corpus))
    texts = [Path(__import__(name).__file__ or "") for name in ("bisect", "heapq", "keyword", "stat", "string")]
    preprocess(find_files([str(path) for path in texts]), corpus / "corpus", tokenizer.path)

    config = ModelConfig(layers=1, hidden=16, heads=2, ffn=24, sequence_length=16, vocabulary=tokenizer.vocabulary)
    ranks = {projection.name: 4 for projection in factored_projections(config)}
    step = save_model(world / "checkpoints", config, ranks, tokenizer.path)
    edit_manifest(step, lambda content: content["state"]["tokenizer"].update(fingerprint=tokenizer.fingerprint))
    write_consolidated(CheckpointReader(step), world / "consolidated", max_shard_bytes=15_000)
    dense = world / "dense"
    dense.mkdir()
    write_dense_export(ConsolidatedModel(world / "consolidated"), dense, dtype=torch.float32, max_shard_bytes=10**9)
    marker = {"kind": DENSE_EXPORT, "files": [FACTS_NAME, *files_below(dense)]}
    (dense / FACTS_NAME).write_text(json.dumps(marker))

    settings, start = world / "settings", world / "start"
    settings.mkdir()
    data = {"prefix": str(corpus / "corpus"), "tokenizer": str(tokenizer.path)}
    sections = {"data": data, "rank": {"initial": 4}, "model": config.model_dump()}
    (settings / "base.yaml").write_text(yaml.safe_dump(sections))
    (settings / "run.yaml").write_text("extends: base.yaml\n")
    (settings / "deepspeed.json").write_text("{}")
    (settings / "race.yaml").write_text(json.dumps(RACE))
    Results(settings / "results.json").add("runs", "a", {})
    (settings / "hosts").write_text("one slots=8\n")
    (settings / "text.jsonl").write_text('{"text": "a"}\n')
    with zipfile.ZipFile(settings / "wikitext.zip", "w") as archive:
        for share in ("train", "valid", "test"):
            archive.writestr(f"wikitext/wiki.{share}.raw", " \n = Title = \n \n Text . \n")
    byte_level(world / "published", {"eos_token": END})
    job = Job(find_files([str(texts[0])]), settings / "parts", tokenizer, ("text",), True, 1, False)
    job.tokenize(0, 1)
    shutil.copytree(world / "consolidated", start / "model")
    (start / "run.yaml").write_text(yaml.safe_dump(sections))
    return world
