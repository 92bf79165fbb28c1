"""The tokenizer gives text back as it was, and its Hugging Face export gives the same ids."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, GPT2Config, LlamaConfig

from pretrain.errors import DataError
from pretrain.tokenizer.sentencepiece import (
    END_OF_DOCUMENT,
    MAXIMUM_RUN,
    SPACE,
    SentencePieceTokenizer,
    export_tokenizer,
)
from tools.corpus.documents import find_files, read_documents
from tools.train_tokenizer import train_tokenizer, write_tokenizer

VOCABULARY = {"bpe": 2000, "unigram": 1500}
SPECIAL_STRINGS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<mask>",
    "<0x0A>",
    "<0xE2>",
    "<|endoftext|>",
    "<|end of document|>",
]
ADVERSARIAL = [
    *(f"a{special}b {special} {special}{special}\n{special}" for special in SPECIAL_STRINGS),
    "",
    " ",
    "\n",
    "\r\n\r\r\n",
    "\t\ttab\t \t",
    " leading and trailing ",
    "  two  spaces  between   words   ",
    " " * 5000,
    "x" * 5000,
    "\n" * 5000,
    "ab" * (MAXIMUM_RUN + 1),
    " " * (MAXIMUM_RUN + 1) + "word" + " " * MAXIMUM_RUN,
    "\x00",
    "a\x00b \x00\x00 c",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\u2028\u2029\ufeff",
    "😀👩\u200d👩\u200d👧\u200d👦 🏴\U000e0067\U000e0062 e\u0301 \u0065\u0301 \ufb01 Å Å",
    "日本語のテキスト、空白なし" * 300,
    "\ufffd \ufffe \U0010ffff \ud7ff\ue000",
    "no\u00a0break\u2003em\u3000wide",
    "12345 3.14159 0x0A 1_000",
]
EXCEPTIONS = [SPACE, f"a{SPACE}b", f" {SPACE} {SPACE}{SPACE}", f"text {END_OF_DOCUMENT} text"]


@pytest.fixture(scope="session")
def library() -> list[str]:
    """Texts of the standard library's files."""
    return [document.text for document in read_documents(find_files(["stdlib"]), ["text"])]


@pytest.fixture(scope="session", params=["bpe", "unigram"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tokenizer of each kind, and its export as transformers loads it."""
    folder = tmp_path_factory.mktemp(request.param)
    files = find_files(["stdlib"])[:: 20 if request.param == "bpe" else 50]
    model = train_tokenizer(files, kind=request.param, vocabulary=VOCABULARY[request.param])
    tokenizer = write_tokenizer(model, folder / "tokenizer.model")
    export_tokenizer(tokenizer, folder, sequence_length=512)
    return SimpleNamespace(
        kind=request.param, folder=folder, tokenizer=tokenizer, exported=AutoTokenizer.from_pretrained(folder)
    )


def exported_ids(trained: SimpleNamespace, texts: list[str]) -> list[list[int]]:
    return trained.exported(texts, return_attention_mask=False, verbose=False)["input_ids"]


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["sixth", "all"])
def test_standard_library_comes_back_and_ids_are_the_exports(
    trained: SimpleNamespace, library: list[str], every: int
) -> None:
    assert len(library) > 500
    if trained.kind == "unigram":
        library = library[::every]
    tokenizer = trained.tokenizer
    ids = [tokenizer.encode(text) for text in library]
    assert [tokenizer.decode(tokens) for tokens in ids] == [text.replace(SPACE, " ") for text in library]
    differing = [n for n, tokens in enumerate(exported_ids(trained, library)) if tokens != ids[n]]
    assert differing == []


def test_adversarial_text_comes_back_from_both(trained: SimpleNamespace) -> None:
    for text, tokens in zip(ADVERSARIAL, exported_ids(trained, ADVERSARIAL), strict=True):
        assert trained.tokenizer.encode(text) == tokens, repr(text[:60])
        assert trained.tokenizer.decode(tokens) == text
        assert trained.exported.decode(tokens) == text
        assert trained.tokenizer.end_of_document not in tokens


def test_the_sign_for_a_space_is_the_only_exception(trained: SimpleNamespace) -> None:
    for text, tokens in zip(EXCEPTIONS, exported_ids(trained, EXCEPTIONS), strict=True):
        assert trained.tokenizer.encode(text) == tokens
        assert trained.tokenizer.decode(tokens) == text.replace(SPACE, " ")
        assert trained.exported.decode(tokens) == text.replace(SPACE, " ")
        assert trained.tokenizer.end_of_document not in tokens


def test_random_text_gets_the_exports_ids(trained: SimpleNamespace) -> None:
    """Random text of few characters has many ties and overlapping pieces."""
    draw = random.Random(7)
    alphabets = [
        "a ",
        " \n",
        "ab",
        "=- #",
        "  e_",
        "\n)(: ",
        "self",
        "xé日\t<>0A",
        f"{SPACE} .",
        "-=\n",
        "01 ",
        "ing tion",
    ]
    texts = ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(1, 90))) for _ in range(4000)]
    differing = [
        text
        for text, tokens in zip(texts, exported_ids(trained, texts), strict=True)
        if trained.tokenizer.encode(text) != tokens
    ]
    assert differing == []


def test_ids_are_sentencepieces_own(trained: SimpleNamespace, library: list[str]) -> None:
    """Cutting text into blocks changes nothing as long as single precision is exact."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained.folder / "tokenizer.model"))
    for text in library[::10]:
        short = text[:8000]
        assert trained.tokenizer.encode(short) == processor.encode(short)


def test_end_of_document_is_known_by_id_alone(trained: SimpleNamespace) -> None:
    tokenizer, exported = trained.tokenizer, trained.exported
    end = tokenizer.end_of_document
    assert exported.eos_token_id == end == tokenizer.eod
    assert len(exported) == tokenizer.vocabulary
    assert exported.model_max_length == 512
    ids = [*tokenizer.encode("one"), end, *tokenizer.encode(" two"), end]
    assert tokenizer.decode(ids) == "one two"
    assert exported.decode(ids, skip_special_tokens=True) == "one two"
    assert exported.decode(ids) == f"one{END_OF_DOCUMENT} two{END_OF_DOCUMENT}".replace(SPACE, " ")
    assert exported("one")["input_ids"] == tokenizer.encode("one")  # nothing is added in front or behind


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_mask_token_is_known_by_id_alone(tmp_path: Path, kind: str) -> None:
    """In both forms of the tokenizer `<mask>` inside a text is text, even in the text it was trained on."""
    (tmp_path / "masks.txt").write_text("a <mask> in a text, <mask><mask>\n" * 500)
    files = [tmp_path / "masks.txt", *find_files(["stdlib"])[::60]]
    tokenizer = write_tokenizer(train_tokenizer(files, kind=kind, vocabulary=600, mask_token=True), tmp_path / "model")
    export_tokenizer(tokenizer, tmp_path, sequence_length=128)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocabulary == len(exported) == 600
    assert tokenizer.mask is not None
    assert tokenizer.mask == exported.mask_token_id != tokenizer.end_of_document
    assert not tokenizer.ordinary_tokens()[tokenizer.mask]
    assert tokenizer.byte_lengths()[tokenizer.mask] == 0
    for text in [*ADVERSARIAL, "<mask>", " <mask>", "a<mask><mask> b\n<mask>", "<mas", "k>"]:
        ids = tokenizer.encode(text)
        assert exported(text)["input_ids"] == ids
        assert tokenizer.mask not in ids
        assert tokenizer.decode(ids) == exported.decode(ids) == text
    hidden = [*tokenizer.encode("one"), tokenizer.mask, *tokenizer.encode(" two")]
    assert tokenizer.decode(hidden) == exported.decode(hidden, skip_special_tokens=True) == "one two"
    assert exported.decode(hidden) == "one<mask> two"


def test_a_tokenizer_has_a_mask_token_only_if_asked(trained: SimpleNamespace, tmp_path: Path) -> None:
    assert trained.tokenizer.mask is None
    assert trained.exported.mask_token is None
    model = sentencepiece_model_pb2.ModelProto.FromString((trained.folder / "tokenizer.model").read_bytes())
    next(piece for piece in model.pieces if piece.piece == "self").piece = "<mask>"
    refuse(model, tmp_path, "its piece <mask> is no control token")


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()], ids=["llama", "gpt2"])
def test_export_beside_a_model_config(trained: SimpleNamespace, tmp_path: Path, config: LlamaConfig) -> None:
    """transformers must not choose the model family's own tokenizer class."""
    export_tokenizer(trained.tokenizer, tmp_path, sequence_length=128)
    config.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    for text in ADVERSARIAL:
        assert exported(text)["input_ids"] == trained.tokenizer.encode(text)


def test_export_survives_saving_again(trained: SimpleNamespace, tmp_path: Path) -> None:
    trained.exported.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*ADVERSARIAL, *EXCEPTIONS]:
        assert again(text)["input_ids"] == trained.tokenizer.encode(text)
    assert again.eos_token_id == trained.tokenizer.end_of_document


def test_byte_lengths_add_up(trained: SimpleNamespace) -> None:
    tokenizer = trained.tokenizer
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocabulary,)
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.end_of_document] == 0
    for text in ADVERSARIAL:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_what_megatron_core_asks(trained: SimpleNamespace) -> None:
    tokenizer = trained.tokenizer
    assert tokenizer.vocab_size == tokenizer.vocabulary == VOCABULARY[trained.kind]
    assert json.loads(json.dumps(tokenizer.unique_identifiers))["fingerprint"] == tokenizer.fingerprint


def test_missing_and_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.model .*data\.tokenizer"):
        SentencePieceTokenizer(tmp_path / "nothing.model")
    for content in (b"", b"no model at all"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.model .*tools/train_tokenizer\.py"):
            SentencePieceTokenizer(tmp_path / "bad.model")


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("normalizer_spec.add_dummy_prefix", True, "whitespace"),
        ("normalizer_spec.remove_extra_whitespaces", True, "whitespace"),
        ("normalizer_spec.escape_whitespaces", False, "U\\+2581"),
        ("trainer_spec.eos_id", 5, "end-of-document"),
    ],
)
def test_inexact_models_are_refused(
    trained: SimpleNamespace, tmp_path: Path, setting: str, value: object, reason: str
) -> None:
    model = sentencepiece_model_pb2.ModelProto.FromString((trained.folder / "tokenizer.model").read_bytes())
    section, field = setting.split(".")
    setattr(getattr(model, section), field, value)
    refuse(model, tmp_path, reason)


def test_models_with_other_pieces_are_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    content = (trained.folder / "tokenizer.model").read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    word = next(piece for piece in model.pieces if piece.piece == "self")
    for spelling in (f"a{SPACE}b", f"{SPACE}{SPACE}b", f"b{SPACE}"):
        word.piece = spelling
        refuse(model, tmp_path, "reaches over a space")
    word.type = word.USER_DEFINED
    refuse(model, tmp_path, "user-defined")
    model = sentencepiece_model_pb2.ModelProto.FromString(content)
    next(piece for piece in model.pieces if piece.piece == "<").piece = "\u3042\u3044"
    refuse(model, tmp_path, "ASCII")
    if trained.kind == "unigram":
        model = sentencepiece_model_pb2.ModelProto.FromString(content)
        model.pieces[-1].score = -7.1
        refuse(model, tmp_path, "multiples")
        model.pieces[-1].score = -40.0
        refuse(model, tmp_path, "too far for exact sums")


def test_a_model_with_sentencepieces_defaults_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from, and some more of them"]),
        model_prefix=str(tmp_path / "default"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="normalizes"):
        SentencePieceTokenizer(tmp_path / "default.model")


def refuse(model: sentencepiece_model_pb2.ModelProto, folder: Path, reason: str) -> None:
    (folder / "other.model").write_bytes(model.SerializeToString())
    with pytest.raises(DataError, match=reason):
        SentencePieceTokenizer(folder / "other.model")
