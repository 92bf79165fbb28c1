"""A sentencepiece model as tokenizer, under conditions that make it exact.

1. decode(encode(text)) == text: no normalization, no added or removed whitespace, bytes for what has no piece. The only
   exception is U+2581, sentencepiece's own sign for a space, which comes back as a space.
2. Text stays text: `<s>` or `<0x0A>` in a document are spelled out; special tokens are only ever added by id.
3. The same ids from sentencepiece and from the exported Hugging Face tokenizer. For that, text is cut where no piece
   can reach across (between a word and the space in front of the next), and inside a run of more than `MAXIMUM_RUN`
   characters of either kind; and unigram scores are multiples of `SCORE_QUANTUM`, so that the sums of a segment are
   exact in sentencepiece's single precision as well as in double: no rounding decides between two segmentations.

`tools/train_tokenizer.py` writes such models; any other model is refused when it is opened.

An export has the same ids to the last one. `transformers` has no ready-made class for that: its Llama tokenizer gives
other ids for unigram models, and its readers of sentencepiece files cut special strings out of ordinary text. So
`tokenizer.json` is written here:

- sentencepiece BPE joins *any* two neighbours whose union is a piece, best piece first, leftmost first; Hugging Face
  BPE knows ranked pairs. So each piece gives one pair for every way to cut it in two pieces, ranked by the piece.
- In Hugging Face's unigram model byte and control pieces are ordinary candidates; a score below any path of ordinary
  characters keeps them out of text.
- The end-of-document token and the mask token are no "added tokens" in `tokenizer.json`; `tokenizer_config.json` names
  them as `eos_token` and `mask_token`, with `split_special_tokens`: their spelling inside text is still text.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as TokenizerFile

from pretrain.errors import DataError
from pretrain.tokenizer.base import MODEL_NAME, Tokenizer

SPACE = "\u2581"
"""Character that stands for a space inside pieces."""
END_OF_DOCUMENT = f"<|end{SPACE}of{SPACE}document|>"
"""Spelling of the control token behind every document; added by id, never read from text."""
MASK = "<mask>"
"""Spelling of the control token that hides a token from a masked objective, if the tokenizer has one; added by id,
never read from text."""
MAXIMUM_RUN = 1536
"""Longest run of spaces, and of other characters, that is encoded as a whole."""
SCORE_QUANTUM = 2.0**-7
"""Unit of unigram scores: all are multiples of it."""
LARGEST_EXACT_SUM = SCORE_QUANTUM * 2**24
"""Largest number up to which single precision holds every multiple of `SCORE_QUANTUM`."""
UNKNOWN_PENALTY = 10.0
"""How much worse than the rarest piece sentencepiece's unigram model scores a character without a piece."""
SEGMENT_PATTERN = f"[ {SPACE}]{{1,{MAXIMUM_RUN}}}[^ {SPACE}]{{0,{MAXIMUM_RUN}}}|[^ {SPACE}]{{1,{MAXIMUM_RUN}}}"
"""Pattern of one word with the spaces in front of it, beyond which no piece reaches."""

UNREACHABLE_SCORE = -4096.0
"""Score of special pieces, lower than the sum of any spelling of them, character by character."""

_SEGMENT = re.compile(SEGMENT_PATTERN)
# Blocks of some thousand characters, in whole words: the same ids with fewer calls than one per word.
_BLOCK = re.compile(rf"(?s:.{{1,1024}})[ {SPACE}]*[^ {SPACE}]*")
_PIECE = re.compile(f"{SPACE}+|{SPACE}?[^ {SPACE}]+")

Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
TrainerSpec = sentencepiece_model_pb2.TrainerSpec


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read the tokenizer {self.path} ({error.strerror}): set data.tokenizer (--tokenizer-model) "
                "to a file written by tools/train_tokenizer.py"
            ) from error
        self.fingerprint: str = hashlib.sha256(content).hexdigest()
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(
                f"{self.path} is not a sentencepiece model: train one with tools/train_tokenizer.py"
            ) from error
        self.model = sentencepiece_model_pb2.ModelProto.FromString(content)
        reason = _unmet_condition(self.model)
        if reason:
            raise DataError(
                f"the tokenizer {self.path} cannot be used exactly: {reason}; train one with tools/train_tokenizer.py"
            )
        self.vocabulary: int = len(self.model.pieces)
        self.end_of_document: int = self._processor.eos_id()
        masks = [token for token, piece in enumerate(self.model.pieces) if piece.piece == MASK]
        self.mask: int | None = masks[0] if masks else None
        """Id of the mask token; None in a tokenizer that was trained without one."""

    @property
    def kind(self) -> Literal["bpe", "unigram"]:
        return "bpe" if self.model.trainer_spec.model_type == TrainerSpec.BPE else "unigram"

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; no special tokens."""
        segments: list[str] = []
        for block in _BLOCK.findall(text):
            if len(block) > MAXIMUM_RUN:
                segments += _SEGMENT.findall(block)
            else:
                segments.append(block)
        return [token for ids in self._processor.encode(segments, num_threads=1) for token in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control tokens decode to nothing."""
        text: str = self._processor.decode([int(token) for token in ids])
        return text

    def ordinary_tokens(self) -> np.ndarray:
        """Which ids stand for text, bool (vocabulary,): all but control tokens and the unknown token."""
        return np.array([piece.type in (Piece.NORMAL, Piece.BYTE) for piece in self.model.pieces])

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes each token stands for, int64 (vocabulary,); 0 for control tokens."""
        lengths = np.zeros(self.vocabulary, dtype=np.int64)
        for token, piece in enumerate(self.model.pieces):
            if piece.type == Piece.BYTE:
                lengths[token] = 1
            elif piece.type == Piece.NORMAL:
                lengths[token] = len(piece.piece.replace(SPACE, " ").encode())
        return lengths

    def comes_back(self, text: str, ids: Sequence[int]) -> bool:
        return SPACE not in text  # by the conditions above

    def files(self) -> dict[str, Path]:
        return {MODEL_NAME: self.path}

    def export(self, folder: Path, sequence_length: int) -> None:
        export_tokenizer(self, folder, sequence_length)
        shutil.copyfile(self.path, folder / MODEL_NAME)


def export_tokenizer(tokenizer: SentencePieceTokenizer, folder: Path, sequence_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, which
    `AutoTokenizer.from_pretrained(folder)` loads; `sequence_length` becomes `model_max_length`."""
    exported = TokenizerFile(_bpe(tokenizer) if tokenizer.kind == "bpe" else _unigram(tokenizer))
    exported.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SEGMENT_PATTERN), "isolated"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
        ]
    )
    exported.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    exported.save(str(folder / "tokenizer.json"))
    special_tokens = {"eos_token": END_OF_DOCUMENT}
    if tokenizer.mask is not None:
        special_tokens["mask_token"] = MASK
    settings = {
        # The class that takes tokenizer.json as it is, beside a Llama or GPT-2 config too.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_length,
    }
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special_tokens)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _bpe(tokenizer: SentencePieceTokenizer) -> models.BPE:
    vocabulary = {piece.piece: token for token, piece in enumerate(tokenizer.model.pieces)}
    return models.BPE(vocab=vocabulary, merges=_merges(tokenizer), byte_fallback=True, fuse_unk=False)


def _merges(tokenizer: SentencePieceTokenizer) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, in the order in which sentencepiece prefers them."""
    pieces = {p.piece: (-p.score, token) for token, p in enumerate(tokenizer.model.pieces) if p.type == Piece.NORMAL}
    ranked = []
    for union, rank in pieces.items():
        for cut in range(1, len(union)):
            left, right = union[:cut], union[cut:]
            if left in pieces and right in pieces:
                # Two cuts of one piece compete only as left|right|left' with left+right == right+left'. The leftmost
                # comes first, and there the right part is also the beginning of the union. In a run of one repeated
                # unit that holds for both; there the longer part stands left, since shorter ones are remainders.
                ranked.append((rank, not union.startswith(right), -cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _unigram(tokenizer: SentencePieceTokenizer) -> models.Unigram:
    scored = [(p.piece, p.score if p.type == Piece.NORMAL else UNREACHABLE_SCORE) for p in tokenizer.model.pieces]
    return models.Unigram(scored, unk_id=tokenizer.model.trainer_spec.unk_id, byte_fallback=True)


def is_exact(path: Path) -> bool:
    """Whether a file is a sentencepiece model that meets the conditions in this module's docstring."""
    try:
        SentencePieceTokenizer(path)
    except DataError:
        return False
    return True


def _unmet_condition(model: Any) -> str | None:
    """The first condition in this module's docstring that the model does not meet, in words; None if it meets all."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    if trainer.model_type not in (TrainerSpec.BPE, TrainerSpec.UNIGRAM):
        return "it is neither a BPE nor a unigram model"
    if normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        return "it normalizes text or its whitespace, so text does not come back as it was"
    if not normalizer.escape_whitespaces or trainer.treat_whitespace_as_suffix:
        return "it does not write a space as U+2581 in front of a word"
    if sum(piece.type == Piece.BYTE for piece in model.pieces) != 256:
        return "it has no byte fallback, so rare characters are lost"
    ends = [token for token, piece in enumerate(model.pieces) if piece.piece == END_OF_DOCUMENT]
    if ends != [trainer.eos_id] or model.pieces[trainer.eos_id].type != Piece.CONTROL:
        return f"it has no end-of-document token {END_OF_DOCUMENT}"
    if any(piece.piece == MASK and piece.type != Piece.CONTROL for piece in model.pieces):
        return f"its piece {MASK} is no control token, so the mask could be read from text"
    characters = {piece.piece for piece in model.pieces if piece.type == Piece.NORMAL}
    if not characters.issuperset(map(chr, range(0x21, 0x7F))):
        return "it lacks some of the 94 printable ASCII characters, which spell special strings in text"
    for piece in model.pieces:
        if piece.type not in (Piece.NORMAL, Piece.BYTE, Piece.CONTROL, Piece.UNKNOWN):
            return f"it has user-defined or unused pieces such as {piece.piece!r}"
        if piece.type == Piece.NORMAL and not _PIECE.fullmatch(piece.piece):
            return f"its piece {piece.piece!r} reaches over a space into another word"
    if trainer.model_type == TrainerSpec.UNIGRAM:
        scores = [piece.score for piece in model.pieces if piece.type == Piece.NORMAL]
        if any(score % SCORE_QUANTUM for score in scores):
            return f"its scores are not multiples of {SCORE_QUANTUM}, so long sums depend on rounding"
        lowest = min(scores) - UNKNOWN_PENALTY
        if 2 * MAXIMUM_RUN * -lowest > LARGEST_EXACT_SUM or max(scores) > 0:
            return f"its scores run from {min(scores)} to {max(scores)}, too far for exact sums"
    return None
