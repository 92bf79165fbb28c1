"""lm-evaluation-harness on an export of ours: its figures are those of `tools/evaluate.py` and of transformers."""

import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.process_groups import initialize_process_groups
from pretrain.evaluation import evaluate, find_model
from pretrain.tokenizer.load import open_tokenizer
from tests.support.distributed import run
from tests.support.training_runs import make_corpus, train_in_workers, write_config
from tools import consolidate_checkpoint, densify_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason='lm_eval is not installed: pip install -c constraints.txt -e ".[evaluation]"',
    ),
]

QUESTIONS = 24
CHOICES = 4
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `run/`, a training of some steps whose ranks grew, and `export/`, its dense model."""
    folder = tmp_path_factory.mktemp(request.param)
    make_corpus(folder / "corpus")
    config = write_config(folder / "run.yaml", folder / "corpus", folder / "run", model={"family": request.param})
    run(train_in_workers, 2, str(config), ["parallel.tensor=2"])
    with pytest.MonkeyPatch.context() as patch:
        for tool, arguments in (
            (consolidate_checkpoint, ["--checkpoint", folder / "run", "--output", folder / "merged"]),
            (densify_checkpoint, ["--input", folder / "merged", "--output", folder / "export"]),
        ):
            patch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
            tool.main()
    return folder


def held_out() -> list[str]:
    """Documents of many windows, of less than one, and with characters that are no piece of the tokenizer."""
    source = Path(textwrap.__file__).read_text(encoding="utf-8")
    return [source[:3000], source[3000:3060], "Größe – 寸法 🙂\n\n\ttwo  spaces ", source[4000:5500]]


def questions() -> list[dict[str, Any]]:
    """A line of held-out code, and the beginning of the next line among those of other lines, of unlike lengths."""
    lines = [line.strip() for line in Path(textwrap.__file__).read_text().splitlines() if len(line.strip()) > 20]
    draw = random.Random(3)
    asked = []
    for place in draw.sample(range(len(lines) - 1), QUESTIONS):
        next_lines = [lines[place + 1], *draw.sample(lines[:place] + lines[place + 2 :], CHOICES - 1)]
        choices = [line[: draw.randint(8, 24)].rstrip() for line in next_lines]  # lm_eval takes none above 32 tokens
        order = draw.sample(range(CHOICES), CHOICES)
        choices = [choices[one] for one in order]
        asked.append({"line": lines[place][:40].rstrip(), "choices": choices, "answer": order.index(0)})
    return asked


def write_tasks(folder: Path) -> None:
    """Two tasks with their data, as docs/evaluation.md shows them."""
    folder.mkdir()
    tasks: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "own_text": (
            [{"text": text} for text in held_out()],
            {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
        ),
        "own_questions": (
            questions(),
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{line}}",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
            },
        ),
    }
    metrics = {
        "own_text": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
        "own_questions": ("acc", "acc_norm"),
    }
    for name, (documents, settings) in tasks.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **settings,
            "metric_list": [{"metric": metric} for metric in metrics[name]],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def lm_eval(export: Path, tasks: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Runs the command; its figures by task."""
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={export}"),
        *("--include_path", str(tasks), "--tasks", "own_text,own_questions", "--device", "cpu", "--batch_size", "8"),
        *("--output_path", str(output), "--log_samples"),
    ]
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(output / "cache")}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (found,) = output.rglob("results_*.json")
    results: dict[str, dict[str, Any]] = json.loads(found.read_text())["results"]
    return results


def loglikelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """Nats of the continuation; as much of the context as the model has positions for."""
    ids = [*context, *continuation][-model.config.max_position_embeddings - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :]
    chosen = logits.float().log_softmax(-1).gather(-1, torch.tensor(continuation)[:, None])
    return float(chosen.sum())


def test_lm_eval_finds_our_figures(folder: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "tasks")
    results = lm_eval(folder / "export", tmp_path / "tasks", tmp_path / "results")

    # The text: the training model itself, one document after the other, in windows that do not overlap.
    found = find_model(folder / "run", 1)
    tokenizer = open_tokenizer(found.tokenizer_path)
    (nats,) = run(nats_in_worker, 1, str(folder / "run"), held_out())
    text_bytes = sum(len(text.encode()) for text in held_out())
    words = sum(len(re.split(r"\s+", text)) for text in held_out())  # lm_eval counts one behind a final space, too
    assert max(len(tokenizer.encode(text)) for text in held_out()) > 5 * found.positions
    shown = results["own_text"]
    assert shown["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)
    assert shown["byte_perplexity,none"] == pytest.approx(math.exp(nats / text_bytes), rel=1e-5)
    assert shown["word_perplexity,none"] == pytest.approx(math.exp(nats / words), rel=1e-3)

    # The questions: every answer's likelihood by transformers.
    model = AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    ids = AutoTokenizer.from_pretrained(folder / "export")
    right, right_by_length = 0, 0
    expected = []
    for question in questions():
        context = ids.encode(question["line"])
        whole = [ids.encode(f"{question['line']} {choice}") for choice in question["choices"]]
        assert all(one[: len(context)] == context for one in whole)  # the cut is at a token's edge
        answers = [loglikelihood(model, context, one[len(context) :]) for one in whole]
        lengths = [len(choice) for choice in question["choices"]]
        expected.append(answers)
        right += int(np.argmax(answers)) == question["answer"]
        right_by_length += int(np.argmax(np.array(answers) / lengths)) == question["answer"]
    (samples,) = (tmp_path / "results").rglob("samples_own_questions_*.jsonl")
    records = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda record: record["doc_id"])
    likelihoods = [[float(answer[0]) for answer in record["filtered_resps"]] for record in records]
    np.testing.assert_allclose(likelihoods, expected, rtol=1e-4)
    assert results["own_questions"]["acc,none"] == pytest.approx(right / QUESTIONS)
    assert results["own_questions"]["acc_norm,none"] == pytest.approx(right_by_length / QUESTIONS)
    assert 0 < right < QUESTIONS


def nats_in_worker(path: str, texts: list[str]) -> float:
    """Nats of all tokens of the texts together, without an end of document behind any of them."""
    initialize_process_groups(1)
    found = find_model(Path(path), 1)
    tokenizer = open_tokenizer(found.tokenizer_path)
    losses, lengths = found.load(), tokenizer.byte_lengths()
    nats = 0.0
    for text in texts:
        stream = np.array([tokenizer.end_of_document, *tokenizer.encode(text)])
        one = evaluate(losses, stream, lengths, length=found.positions, stride=found.positions, micro_batch=4)
        assert one.bytes == len(text.encode())
        nats += one.lm_loss * one.tokens
    return nats
