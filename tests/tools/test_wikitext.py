"""WikiText's published form: articles by their titles, from an archive or files, to corpora of all three shares."""

import io
import json
import zipfile
from pathlib import Path

import pytest

from pretrain.data.index_check import check_index
from pretrain.errors import DataError
from pretrain.tokenizer.load import open_tokenizer
from tests.support.huggingface_files import byte_level
from tools import corpus_statistics, wikitext
from tools.corpus.documents import read_documents

ARTICLE = """ 
 = Robert {name} = 
 
 Robert {name} is an English film , television and theatre actor . He had a guest @-@ starring role .
 
 = = Career = = 
 
 = 1 = 
 In 2000 {name} had {count} roles ; x 
 = y = 
 holds .
"""


def text_of(names: list[str]) -> str:
    return "".join(ARTICLE.format(name=name, count=len(name)) for name in names) + " \n"


SHARES = {"train": [f"Boulter{number}" for number in range(40)], "valid": ["Meyer", "Smith"], "test": ["Jones"]}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "wikitext-103-raw-v1.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("wikitext-103-raw/", "")
        for share, names in SHARES.items():
            packed.writestr(f"wikitext-103-raw/wiki.{share}.raw", text_of(names))
    return path


def call(monkeypatch: pytest.MonkeyPatch, tool: object, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [str(tool), *map(str, arguments)])
    tool.main()  # type: ignore[attr-defined]


def test_articles_begin_at_titles_between_empty_lines() -> None:
    found = list(wikitext.articles(io.StringIO(text_of(["Boulter", "Meyer"]))))
    assert len(found) == 2
    assert found[0].startswith(" = Robert Boulter = \n \n Robert Boulter is")
    assert " = 1 = \n In 2000" in found[0]
    assert " = y = \n holds" in found[0]
    assert found[1].startswith(" = Robert Meyer = \n")
    assert "".join(found).replace(" \n = Robert", " = Robert") == text_of(["Boulter", "Meyer"])[2:].replace(
        " \n = Robert", " = Robert"
    )
    assert list(wikitext.articles(io.StringIO(" \n \n"))) == []


def test_one_command_makes_three_corpora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, archive: Path
) -> None:
    flags = ("--input", archive, "--output", tmp_path / "corpora" / "wt", "--vocabulary", 400)
    call(monkeypatch, wikitext, *flags)
    tokenizer = open_tokenizer(tmp_path / "corpora" / "wt.model")
    for share, name in wikitext.SHARES.items():
        prefix = tmp_path / "corpora" / f"wt_{share}"
        facts = check_index(prefix, tokenizer.vocabulary, tokenizer.fingerprint)
        assert facts.documents == len(SHARES[name])
        assert facts.round_trip_exceptions == 0
        text = [
            document.text
            for document in read_documents([tmp_path / "corpora/wt_text" / f"{share}.jsonl.zst"], ["text"])
        ]
        assert [f"Robert {who} = \n" in one for who, one in zip(SHARES[name], text, strict=True)] == [True] * len(text)
    said = capsys.readouterr().out
    assert f"data.prefix={tmp_path}/corpora/wt_train data.tokenizer={tmp_path}/corpora/wt.model" in said
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpora").rglob("*") if path.is_file()}
    call(monkeypatch, wikitext, *flags)
    assert "is there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_files_and_another_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    for share, names in SHARES.items():
        (tmp_path / "files" / f"wiki.{share}.tokens").write_text(text_of(names))
    own = byte_level(tmp_path / "gpt2").parent
    call(monkeypatch, wikitext, "--input", tmp_path / "files", "--output", tmp_path / "wt", "--tokenizer-model", own)
    assert not (tmp_path / "wt.model").exists()
    capsys.readouterr()
    flags = ("--corpus", tmp_path / "wt_train", "--tokenizer", own, "--sequence-length", 64)
    call(monkeypatch, corpus_statistics, *flags, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    tokenizer = open_tokenizer(own)
    documents = [tokenizer.encode(text) for text in wikitext.articles(io.StringIO(text_of(SHARES["train"])))]
    lengths = sorted(len(document) + 1 for document in documents)
    assert found["documents"] == 40
    assert found["tokens"] == sum(lengths)
    assert found["document_tokens"]["0.0"] == lengths[0]
    assert found["document_tokens"]["1.0"] == lengths[-1]
    assert found["samples_in_one_epoch"] == (sum(lengths) - 1) // 64
    assert found["documents_longer_than_a_sample"] == sum(length > 64 for length in lengths)
    assert found["ordinary_tokens_used"] == len({token for document in documents for token in document})
    assert found["most_frequent"][0]["share"] == pytest.approx(
        max(sum(document.count(token) for document in documents) for token in {t for d in documents for t in d})
        / sum(lengths)
    )
    table = capsys.readouterr().out
    assert f"{sum(lengths):,}, {sum(lengths) / 40:,.1f} a document" in table


def test_what_is_no_wikitext_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    def message(source: Path) -> str:
        with pytest.raises(DataError) as raised:
            call(monkeypatch, wikitext, "--input", source, "--output", tmp_path / "out" / "wt")
        assert [path.name for path in (tmp_path / "out" / "wt_text").iterdir() if path.name[0] == "."] == []
        return str(raised.value)

    assert "does not exist" in message(tmp_path / "missing.zip")
    (tmp_path / "broken.zip").write_bytes(archive.read_bytes()[:-100])
    assert "give the archive as it was published" in message(tmp_path / "broken.zip")
    (tmp_path / "empty").mkdir()
    assert "holds 0 files wiki.train.raw" in message(tmp_path / "empty")
