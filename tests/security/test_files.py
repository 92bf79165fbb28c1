"""Every file that is read, replaced by one that means to run code: it is refused in a sentence, and nothing is run."""

import gzip
import json
import lzma
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
import zstandard
from safetensors.torch import load_file

from launch.hosts import read_hosts
from pretrain.checkpoint.reader import CheckpointReader, find_checkpoint
from pretrain.config.files import parse_override
from pretrain.config.run import load_config
from pretrain.convert.consolidated import ConsolidatedModel
from pretrain.convert.export_marker import DENSE_EXPORT, check_output
from pretrain.convert.huggingface_import import open_source, source_logits
from pretrain.convert.source import dense_source
from pretrain.data.index_check import check_index
from pretrain.disk import JsonLines
from pretrain.engine.deepspeed_config import deepspeed_dict
from pretrain.errors import EspalierError
from pretrain.growth.initial_values import check_start
from pretrain.tokenizer.load import open_tokenizer
from tests.security.payloads import PICKLES, torch_file, yaml_texts
from tests.security.planting import STEP, command, plant, refusal
from tests.support.checkpoint_cases import edit_manifest
from tools import consolidate_checkpoint, generate, inspect_checkpoint
from tools.corpus.documents import read_documents
from tools.corpus.parts import PartFolder, Unit
from tools.experiments.race_plan import load_race
from tools.experiments.race_results import Results
from tools.wikitext import write_articles


def generated(folder: Path) -> None:
    command(generate, "--model", folder, "--prompt", "def", "--max-new-tokens", 2)


def checked_corpus(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "tokenizer.model")
    check_index(folder / "corpus", tokenizer.vocabulary, tokenizer.fingerprint)


def started(folder: Path) -> None:
    """Starts as a new run does whose `checkpoint.start_from` is `model/`."""
    config = load_config(str(folder / "run.yaml"), [f"checkpoint.start_from={folder / 'model'}"])
    check_start(config, open_tokenizer(config.data.tokenizer))


def deepspeed(folder: Path) -> None:
    config = load_config(str(folder / "run.yaml"), [f"deepspeed.config={folder / 'deepspeed.json'}"])
    deepspeed_dict(config, config.parallel_layout(1))


def joined_parts(folder: Path) -> None:
    """Finds parts again as `tools/preprocess_corpus.py` does; their digests depend on the input's name."""
    for path in (folder / "parts.parts").glob("*.json"):
        unit = Unit((), path.name.partition("_")[0], 0)
        PartFolder(folder / "parts").complete_parts(unit)


def documents(folder: Path) -> None:
    for path in sorted(folder.glob("text.*")):
        list(read_documents([path], ["text"]))


@dataclass(frozen=True)
class Reader:
    """A part of the world, the file in it that is spoilt, and what reads it."""

    part: str
    file: str
    read: Callable[[Path], object]


CHECKPOINT = f"checkpoints/{STEP}"
READERS = {
    "manifest": Reader(CHECKPOINT, "manifest.json", CheckpointReader),
    "manifest, found": Reader("checkpoints", f"{STEP}/manifest.json", find_checkpoint),
    "shard, verified": Reader(CHECKPOINT, "shard_*", lambda folder: CheckpointReader(folder).verify()),
    "shard, inspected": Reader(
        "checkpoints", f"{STEP}/shard_*", lambda folder: command(inspect_checkpoint, "--checkpoint", folder, "--verify")
    ),
    "shard, consolidated": Reader(
        CHECKPOINT,
        "shard_*",
        lambda folder: command(consolidate_checkpoint, "--checkpoint", folder, "--output", folder / "merged"),
    ),
    "shard, one tensor": Reader(
        CHECKPOINT, "shard_*", lambda folder: CheckpointReader(folder).read("decoder.final_layernorm.weight")
    ),
    "tokenizer of a checkpoint": Reader(
        CHECKPOINT,
        "tokenizer.model",
        lambda folder: open_tokenizer(CheckpointReader(folder).extra_file("tokenizer.model")),
    ),
    "consolidated facts and ranks": Reader("consolidated", "espalier.json", ConsolidatedModel),
    "consolidated weights": Reader("consolidated", "model-00001-*", ConsolidatedModel),
    "consolidated index": Reader("consolidated", "model.safetensors.index.json", ConsolidatedModel),
    "consolidated tokenizer": Reader(
        "consolidated", "tokenizer.model", lambda folder: dense_source(ConsolidatedModel(folder))
    ),
    "facts of a start": Reader("start", "model/espalier.json", started),
    "weights of a start": Reader("start", "model/model-00001-*", started),
    "import, settings": Reader("dense", "config.json", open_source),
    "import, weights": Reader("dense", "model.safetensors", open_source),
    "import, tokenizer": Reader("dense", "tokenizer.model", open_source),
    "import of a consolidated folder": Reader("consolidated", "espalier.json", open_source),
    "generate, settings": Reader("dense", "config.json", generated),
    "generate, weights": Reader("dense", "model.safetensors", generated),
    "generate, tokenizer": Reader("dense", "tokenizer.json", generated),
    "generate, tokenizer's settings": Reader("dense", "tokenizer_config.json", generated),
    "marker of an export": Reader(
        "dense", "espalier.json", lambda folder: check_output(folder, Path("/nowhere"), DENSE_EXPORT, overwrite=True)
    ),
    "token ids": Reader("corpus", "corpus.bin", checked_corpus),
    "index": Reader("corpus", "corpus.idx", checked_corpus),
    "facts of a corpus": Reader("corpus", "corpus.json", checked_corpus),
    "tokenizer": Reader("corpus", "tokenizer.model", checked_corpus),
    "published tokenizer": Reader("published", "tokenizer.json", open_tokenizer),
    "settings of a published tokenizer": Reader("published", "tokenizer_config.json", open_tokenizer),
    "part of a corpus": Reader("settings", "parts.parts/*.json", joined_parts),
    "WikiText archive": Reader(
        "settings", "wikitext.zip", lambda folder: write_articles(folder / "wikitext.zip", folder / "articles")
    ),
    "text": Reader("settings", "text.jsonl", documents),
    "config": Reader("settings", "run.yaml", lambda folder: load_config(str(folder / "run.yaml"))),
    "base of a config": Reader("settings", "base.yaml", lambda folder: load_config(str(folder / "run.yaml"))),
    "DeepSpeed config": Reader("settings", "deepspeed.json", deepspeed),
    "hostfile": Reader("settings", "hosts", lambda folder: read_hosts(folder / "hosts")),
    "race": Reader("settings", "race.yaml", lambda folder: load_race(folder / "race.yaml")),
    "results of a race": Reader("settings", "results.json", lambda folder: Results(folder / "results.json").read()),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def copied(world: Path, reader: Reader, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the reader's part of the world, and its file in it."""
    folder = tmp_path / reader.part
    shutil.copytree(world / reader.part, folder)
    file = next(folder.glob(reader.file))
    return folder, file


def test_the_bait_works(canary: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    readers: dict[str, Callable[[], object]] = {
        "pickle": lambda: pickle.loads(file.read_bytes()),
        "text": lambda: pickle.loads(file.read_bytes()),
        "torch": lambda: torch.load(file, weights_only=False),
        "numpy": lambda: np.load(file, allow_pickle=True),
    }
    assert readers.keys() == PICKLES.keys()
    for form, read in readers.items():
        file.write_bytes(PICKLES[form](canary))
        read()
        assert canary.exists(), form
        canary.rmdir()
    for text in yaml_texts(canary):
        yaml.unsafe_load(text)
        assert canary.exists(), text
        canary.rmdir()


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_place_of_a_file_is_refused(name: str, world: Path, tmp_path: Path, canary: Path) -> None:
    reader = READERS[name]
    folder, file = copied(world, reader, tmp_path)
    reader.read(folder)  # as long as it is whole
    for form in PICKLES.values():
        plant(file, form(canary))
        refusal(reader.read, folder)
        assert not canary.exists()


@pytest.mark.faults
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, zstandard.compress], ids=["gz", "xz", "zst"])
def test_a_packed_pickle_is_no_text(pack: Callable[[bytes], bytes], tmp_path: Path, canary: Path) -> None:
    suffix = {gzip.compress: "gz", lzma.compress: "xz"}.get(pack, "zst")
    for content in (PICKLES["pickle"](canary), pack(PICKLES["pickle"](canary))):
        (tmp_path / f"text.jsonl.{suffix}").write_bytes(content)
        refusal(documents, tmp_path)
        assert not canary.exists()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["config", "base of a config", "race"])
def test_yaml_tags_are_refused(name: str, world: Path, tmp_path: Path, canary: Path) -> None:
    reader = READERS[name]
    folder, file = copied(world, reader, tmp_path)
    for text in yaml_texts(canary):
        file.write_text(text)
        assert "tags and aliases are not allowed" in refusal(reader.read, folder)
        assert not canary.exists()


@pytest.mark.faults
def test_yaml_tags_on_the_command_line_are_refused(canary: Path) -> None:
    for text in yaml_texts(canary)[:1]:
        with pytest.raises(EspalierError, match="tags and aliases are not allowed"):
            parse_override(f"train.steps={text}")
        assert not canary.exists()


@pytest.mark.faults
@pytest.mark.parametrize(
    "name",
    [
        "manifest",
        "consolidated facts and ranks",
        "consolidated index",
        "import, settings",
        "generate, settings",
        "generate, tokenizer",
        "marker of an export",
        "facts of a corpus",
        "published tokenizer",
        "settings of a published tokenizer",
        "part of a corpus",
        "text",
        "config",
        "DeepSpeed config",
        "race",
        "results of a race",
    ],
)
def test_bottomless_nesting_and_endless_numbers_are_refused(name: str, world: Path, tmp_path: Path) -> None:
    reader = READERS[name]
    folder, file = copied(world, reader, tmp_path)
    for content in (b"[" * 50_000, b'{"a":' * 20_000, b'{"format_version": ' + b"9" * 5_000 + b"}"):
        file.write_bytes(content)
        refusal(reader.read, folder)


HISTORIES: list[dict[str, object]] = [
    {"train": {}},
    {"train": {"step": "x", "consumed_tokens": 0}},
    {"train": {"step": 1, "consumed_tokens": -1}},
    {"growth": [{}]},
    {"growth": [{"step": 1, "before": {}, "after": {}, "seconds": 1.0}]},
    {"growth": [{"step": 1, "before": {"a": "b"}, "after": {"a": 1}, "seconds": 1.0}]},
]


@pytest.mark.faults
@pytest.mark.parametrize("history", HISTORIES)
def test_a_state_that_cannot_be_shown_is_refused(history: dict[str, object], world: Path, tmp_path: Path) -> None:
    folder, _ = copied(world, READERS["manifest"], tmp_path)
    edit_manifest(folder, lambda manifest: manifest["state"].update(history))
    refusal(lambda folder: command(inspect_checkpoint, "--checkpoint", folder), folder)


@pytest.mark.parametrize("config", [[], {"train": 5, "deepspeed": None}])
def test_settings_that_a_state_does_not_have_are_not_needed(config: object, world: Path, tmp_path: Path) -> None:
    folder, _ = copied(world, READERS["manifest"], tmp_path)
    edit_manifest(folder, lambda manifest: manifest["state"].update(config=config))
    command(inspect_checkpoint, "--checkpoint", folder)


# What is passed over instead of refused -------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("form", PICKLES)
def test_a_pickled_pointer_is_not_read(form: str, world: Path, tmp_path: Path, canary: Path) -> None:
    shutil.copytree(world / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "latest").write_bytes(PICKLES[form](canary))
    assert find_checkpoint(tmp_path / "checkpoints") == tmp_path / CHECKPOINT
    assert not canary.exists()


@pytest.mark.faults
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, canary: Path) -> None:
    lines = JsonLines(tmp_path / "events.jsonl")
    hostile = [form(canary) for form in PICKLES.values()]
    hostile += [b"[" * 50_000, b'{"step": ' + b"9" * 5_000 + b"}", b"5", b"[1]", b'"step"', b"\xff\xfe", b"\x00" * 9]
    lines.path.write_bytes(b"\n".join([b'{"step": 1}', *hostile, b'{"step": 3}', b""]))
    assert lines.read() == [{"step": 1}, {"step": 3}]
    lines.cut(2)
    assert lines.path.read_text() == '{"step": 1}\n'
    assert not canary.exists()


# Folders that transformers reads --------------------------------------------------------------------------------------


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def imported(folder: Path) -> None:
    """Reads a folder as `tools/import_huggingface.py` does: by ourselves, and then by transformers, to compare."""
    open_source(folder)
    source_logits(folder, torch.zeros(1, 4, dtype=torch.long))


@pytest.fixture
def dense(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "dense", tmp_path / "dense")
    return tmp_path / "dense"


READ_BY_TRANSFORMERS = pytest.mark.parametrize("read", [imported, generated])


@pytest.mark.faults
@READ_BY_TRANSFORMERS
def test_code_and_pickles_beside_a_model_are_left_alone(
    read: Callable[[Path], None], dense: Path, canary: Path
) -> None:
    code = f"import os\n\nos.mkdir({str(canary)!r})\n\n\nclass Evil:\n    pass\n\n\ngenerate = Evil\n"
    (dense / "custom_generate").mkdir()
    for name in ("evil.py", "custom_generate/generate.py", "modeling_llama.py"):
        (dense / name).write_text(code)
    edit(dense / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    edit(dense / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    edit(dense / "generation_config.json", custom_generate=str(dense), force_words_ids=[[1]])
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth", "adapter_model.bin"):
        (dense / name).write_bytes(torch_file(canary))
    read(dense)
    assert not canary.exists()


@pytest.mark.faults
@READ_BY_TRANSFORMERS
def test_models_that_are_pickled_are_refused(read: Callable[[Path], None], dense: Path, canary: Path) -> None:
    (dense / "model.safetensors").unlink()
    (dense / "pytorch_model.bin").write_bytes(torch_file(canary))
    refusal(read, dense)
    assert not canary.exists()


LEADING_ELSEWHERE: dict[str, dict[str, object]] = {
    "code of its own": {"model_type": "evil", "architectures": ["Evil"], "auto_map": {"AutoConfig": "evil.Evil"}},
    "pickled weights": {"transformers_weights": "adapter_model.bin"},
    "attention of a hub": {"_attn_implementation": "kernels-community/flash-attn2"},
    "attention of another hub": {"attn_implementation": "somebody/kernel"},
    "quantization": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}


@pytest.mark.faults
@READ_BY_TRANSFORMERS
@pytest.mark.parametrize("settings", LEADING_ELSEWHERE.values(), ids=LEADING_ELSEWHERE)
def test_settings_that_lead_beyond_safetensors_are_refused(
    settings: dict[str, object], read: Callable[[Path], None], dense: Path
) -> None:
    """Also where what they lead to is harmless: here the weights themselves, as a pickle that torch takes for safe."""
    torch.save(load_file(dense / "model.safetensors"), dense / "adapter_model.bin")
    edit(dense / "config.json", **settings)
    refusal(read, dense)


@pytest.mark.faults
@READ_BY_TRANSFORMERS
def test_a_model_with_an_adapter_beside_it_is_refused(read: Callable[[Path], None], dense: Path, canary: Path) -> None:
    """Where `peft` is installed transformers would load it, from wherever it says."""
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (dense / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": "elsewhere"}))
    (dense / "adapter_model.bin").write_bytes(torch_file(canary))
    assert "adapter" in refusal(read, dense)
    assert not canary.exists()
