"""A tokenizer as Hugging Face files, with the same ids to the last one.

`transformers` has no ready-made class for that: its Llama tokenizer gives other ids for unigram models, and its readers
of sentencepiece files cut special strings out of ordinary text. So `tokenizer.json` is written here:

- sentencepiece BPE joins *any* two neighbours whose union is a piece, best piece first, leftmost first; Hugging Face
  BPE knows ranked pairs. So each piece gives one pair for every way to cut it in two pieces, ranked by the piece.
- In Hugging Face's unigram model byte and control pieces are ordinary candidates; a score below any path of ordinary
  characters keeps them out of text.
- The end-of-document token and the mask token are no "added tokens" in `tokenizer.json`; `tokenizer_config.json` names
  them as `eos_token` and `mask_token`, with `split_special_tokens`: their spelling inside text is still text.
"""

import json
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from pretrain.tokenizer.sentencepiece import (
    END_OF_DOCUMENT,
    MASK,
    SEGMENT_PATTERN,
    SPACE,
    Piece,
    SentencePieceTokenizer,
)

UNREACHABLE_SCORE = -4096.0
"""Lower than the sum of any special piece's spelling, character by character."""


def export_tokenizer(tokenizer: SentencePieceTokenizer, folder: Path, sequence_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json, which
    `AutoTokenizer.from_pretrained(folder)` loads; `sequence_length` becomes `model_max_length`."""
    exported = HuggingFaceTokenizer(_bpe(tokenizer) if tokenizer.kind == "bpe" else _unigram(tokenizer))
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
                # Two cuts of one piece compete only as left|right|left' with left+right == right+left': the leftmost
                # is due first, and there the right part is also the beginning of the union. In a run of one repeated
                # unit that holds both ways; there the longer part stands left, shorter ones being remainders.
                ranked.append((rank, not union.startswith(right), -cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _unigram(tokenizer: SentencePieceTokenizer) -> models.Unigram:
    scored = [(p.piece, p.score if p.type == Piece.NORMAL else UNREACHABLE_SCORE) for p in tokenizer.model.pieces]
    return models.Unigram(scored, unk_id=tokenizer.model.trainer_spec.unk_id, byte_fallback=True)
