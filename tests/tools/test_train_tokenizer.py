"""The tokenizer tool: the same file from the same input, and refusals in one sentence."""

import json
from pathlib import Path

import pytest

from pretrain.errors import DataError
from pretrain.tokenizer.sentencepiece import SentencePieceTokenizer
from tools import train_tokenizer as tool
from tools.corpus.documents import find_files
from tools.train_tokenizer import CHUNK_CHARACTERS, draw_sample, split_text, train_tokenizer


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *map(str, arguments)])
    tool.main()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic(kind: str) -> None:
    files = find_files(["stdlib"])[::150]
    first, again = (train_tokenizer(files, kind=kind, vocabulary=700) for _ in range(2))
    assert first == again
    assert train_tokenizer(files[1:], kind=kind, vocabulary=700) != first


def test_seed_draws_the_sample() -> None:
    files = find_files(["stdlib"])[::25]
    first, again, other = (train_tokenizer(files, vocabulary=500, seed=s, sample_chunks=100) for s in (1, 1, 2))
    assert first == again
    assert first != other
    whole, also_whole = (train_tokenizer(files, vocabulary=500, seed=s) for s in (1, 2))
    assert whole == also_whole


def test_sample_is_fair_and_bounded() -> None:
    chunks = [str(n) for n in range(50)]
    assert draw_sample(iter(chunks), 50, seed=1) == draw_sample(iter(chunks), 80, seed=2) == chunks
    samples = [draw_sample(iter(chunks), 10, seed) for seed in range(2000)]
    assert all(len(set(sample)) == 10 for sample in samples)
    counts = [sum(chunk in sample for sample in samples) for chunk in chunks]
    assert 300 < min(counts) <= max(counts) < 500  # 400 expected, 18 the standard deviation


def test_chunks_hold_all_of_the_text() -> None:
    for text in ("", "short", "\n" * 3000, "x" * 3000, "line\n" * 900, "x" * 1500 + "\nline\n" * 300):
        chunks = list(split_text(text))
        assert "".join(chunks) == text
        assert all(0 < len(chunk) <= CHUNK_CHARACTERS for chunk in chunks)


def test_special_strings_and_odd_characters_in_the_training_text(tmp_path: Path) -> None:
    """They neither stop the training nor become tokens."""
    text = "<s> <unk> </s> <0x0A> <|end of document|> \x00 \u2585 \t \u2581 word\n" * 400
    (tmp_path / "a.txt").write_text(text + "other words in a line\n" * 400)
    (tmp_path / "model").write_bytes(train_tokenizer([tmp_path / "a.txt"], vocabulary=375))
    tokenizer = SentencePieceTokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")
    assert tokenizer.end_of_document not in tokenizer.encode(text)


def test_tool_writes_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = [json.dumps({"body": f"def function_{n}(argument):\n    return argument + {n}\n"}) for n in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    output = tmp_path / "new" / "tokenizer.model"
    arguments = ("--input", tmp_path / "a.jsonl", "--json-keys", "body", "--output", output, "--vocabulary", 380)
    call(monkeypatch, *arguments)
    assert SentencePieceTokenizer(output).vocabulary == 380
    assert "380 tokens" in capsys.readouterr().out
    assert list(output.parent.iterdir()) == [output]
    before = output.read_bytes()
    with pytest.raises(DataError, match=r"exists.*--overwrite"):
        call(monkeypatch, *arguments)
    call(monkeypatch, *arguments, "--overwrite")
    assert output.read_bytes() == before
    call(monkeypatch, *arguments, "--overwrite", "--mask-token")
    assert (SentencePieceTokenizer(output).vocabulary, SentencePieceTokenizer(output).mask) == (380, 2)


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("a few words and no more\n")
    output = ("--output", tmp_path / "out.model")
    with pytest.raises(DataError, match=r"at most 3[0-9]+ tokens, and --vocabulary is 5000: lower --vocabulary"):
        call(monkeypatch, "--input", text, *output, "--vocabulary", 5000)
    with pytest.raises(DataError, match=r"--vocabulary is 300, and .* take 352: raise --vocabulary"):
        call(monkeypatch, "--input", text, *output, "--vocabulary", 300)
    with pytest.raises(DataError, match=r"--vocabulary is 352, and .* take 353: raise --vocabulary"):
        call(monkeypatch, "--input", text, *output, "--vocabulary", 352, "--mask-token")
    with pytest.raises(DataError, match="--sample-chunks is 0"):
        call(monkeypatch, "--input", text, *output, "--sample-chunks", 0)
    with pytest.raises(DataError, match="does not exist: change --input"):
        call(monkeypatch, "--input", tmp_path / "none.txt", *output)
    text.write_text("".join(map(chr, range(0x4E00, 0x5E00))))
    with pytest.raises(DataError, match=r"characters alone take 4[0-9]+ tokens, and --vocabulary is 400"):
        call(monkeypatch, "--input", text, *output, "--vocabulary", 400)
    for content in ("", "\n\n\n"):
        text.write_text(content)
        with pytest.raises(DataError, match="holds no text to learn from"):
            call(monkeypatch, "--input", text, *output)
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\nbad\n')
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: is not JSON"):
        call(monkeypatch, "--input", tmp_path / "b.jsonl", *output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.jsonl"]
