"""What a run learns to predict: the next token (causal), or tokens that were hidden from it (masked).

megatron-core's samples are made for the causal objective: `labels` are `tokens` one further on. Masked (Devlin et al.
2019, BERT, section 3.1): of a sample's tokens x, a random share p is chosen, S with |S| = round(p · length); of the
chosen ones 80 % become the mask token, 10 % a random token, and 10 % stay. The model sees the result x̃ in both
directions and predicts

    loss = -1/|S| Σ_{i∈S} log P(x_i | x̃)

|S| is the same in every sample, so the mean over samples is the mean over chosen tokens, however a batch is split over
processes and micro-steps. What is chosen follows from the run seed and the sample's place in the order of all samples,
by a counter-based generator (Philox, Salmon et al. 2011): it depends on no parallel layout and no running state,
differs from epoch to epoch, and validation hides the same tokens every time.
"""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.config.run import TrainConfig
from pretrain.data.corpus import Corpus
from pretrain.errors import DataError
from pretrain.tokenizer.base import Tokenizer

MASK_PROBABILITY = 0.15
"""BERT's share of chosen tokens."""
HIDDEN_SHARE, RANDOM_SHARE = 0.8, 0.1
"""BERT's shares of the chosen tokens that become the mask token, and a random one."""


def mask_token(tokenizer: Tokenizer) -> int:
    """Id of the mask token; DataError if the tokenizer has none."""
    if tokenizer.mask is None:
        raise DataError(
            f"train.objective is mlm, and the tokenizer {tokenizer.path} has no mask token: train one with "
            "tools/train_tokenizer.py --mask-token and write the corpus anew with it, or set train.objective=causal"
        )
    return tokenizer.mask


def corpus_for(train: TrainConfig, corpus: Corpus, seed: int) -> Corpus:
    """The corpus with samples for the objective of the run."""
    if train.objective == "causal":
        return corpus
    probability = train.mask_probability or MASK_PROBABILITY
    training = MaskedSamples(corpus.train, corpus.tokenizer, probability, f"{seed}:training")
    validation = {
        name: MaskedSamples(samples, corpus.tokenizer, probability, f"{seed}:validation{name and ':'}{name}")
        for name, samples in corpus.validation.items()
    }
    return replace(corpus, train=training, validation=validation)


class MaskedSamples:
    """The samples of a `GPTDataset` with some of their tokens hidden: `labels` are the tokens themselves, `loss_mask`
    is 1 where they were chosen.

    Ordinary tokens are chosen. Control tokens, such as the end of a document, are chosen only in samples that have too
    few ordinary ones. `stream` names the random numbers: another name gives other choices.
    """

    def __init__(self, samples: Any, tokenizer: Tokenizer, probability: float, stream: str) -> None:
        self._samples, self._probability, self._mask = samples, probability, mask_token(tokenizer)
        self._ordinary = tokenizer.ordinary_tokens()
        self._replacements = np.flatnonzero(self._ordinary)
        self._key = int.from_bytes(hashlib.sha256(f"masks:{stream}".encode()).digest()[:16], "big")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sample `index`: tokens, labels, loss_mask (fp32) and position_ids, each (sequence_length,)."""
        sample = self._samples[index]
        labels = sample["tokens"].numpy()
        # Each sample has 2**64 blocks of random numbers of its own.
        draw = np.random.Generator(np.random.Philox(key=self._key, counter=int(index) << 64))
        chosen = self._choose(labels, draw)
        tokens, loss_mask = labels.copy(), np.zeros(len(labels), dtype=np.float32)
        loss_mask[chosen] = 1.0
        fate = draw.random(len(chosen))
        random_tokens = draw.choice(self._replacements, len(chosen))
        tokens[chosen] = np.select(
            [fate < HIDDEN_SHARE, fate < HIDDEN_SHARE + RANDOM_SHARE], [self._mask, random_tokens], labels[chosen]
        )
        return {
            **sample,
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy(loss_mask),
        }

    def _choose(self, labels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        """Different places in a sample, the same number in each: those with the smallest random numbers, ordinary
        tokens first."""
        count = max(1, round(self._probability * len(labels)))
        numbers = draw.random(len(labels)) + ~self._ordinary[labels]
        return np.argsort(numbers, kind="stable")[:count]
