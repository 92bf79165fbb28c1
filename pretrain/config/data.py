"""Settings of a run's text: section `data`."""

import math

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

DEFAULT_SPLIT = "98,2,0"
WITHOUT_HELD_OUT = "100,0,0"


class DataConfig(BaseModel):
    """The text a run learns from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: str | None = Field(
        None, min_length=1, description="corpus written by tools/preprocess_corpus.py, without .bin or .idx"
    )
    blend: dict[str, float] | None = Field(
        None, min_length=2, description="instead of data.prefix: several corpora, and the share of the samples of each"
    )
    validation: dict[str, str] = Field(
        {},
        description="held-out corpora by name; the first one's loss is the run's validation loss. Without any, "
        "data.split holds documents out",
    )
    tokenizer: str = Field(
        min_length=1,
        description="tokenizer (model file, tokenizer.json, or their folder) that the corpora were written with",
    )
    split: str | None = Field(
        None,
        description="shares of the documents for training, validation and test; none: 98,2,0, and 100,0,0 with "
        "data.validation",
    )
    within_documents: bool = Field(
        False,
        description="attention stays inside each document, and learned positions begin anew in it. For corpora of "
        "short documents; on a CPU it costs a mask of length² numbers",
    )
    cache: str | None = Field(
        None,
        description="folder for sample indices, one run's alone, made anew at every start; none: in run.folder",
    )

    @property
    def shares(self) -> str:
        """`split`, or its default if it is not set."""
        return self.split or (WITHOUT_HELD_OUT if self.validation else DEFAULT_SPLIT)

    def weights(self) -> dict[str, float]:
        """Weights of the corpora to train on, by prefix."""
        return dict(self.blend) if self.blend is not None else {str(self.prefix): 1.0}

    def prefixes(self) -> list[str]:
        """Prefixes of all corpora, each once."""
        return list(dict.fromkeys([*self.weights(), *self.validation.values()]))

    @field_validator("split")
    @classmethod
    def _split_is_three_shares(cls, split: str | None) -> str | None:
        if split is None:
            return None
        try:
            shares = [float(share) for share in split.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or not all(0.0 <= share < math.inf for share in shares) or not shares[0]:
            raise ValueError(
                f"data.split is {split!r}: set it to three shares such as 98,2,0 (training, validation, test), "
                "none negative, the first above 0"
            )
        return split

    @field_validator("blend")
    @classmethod
    def _weights_are_positive(cls, blend: dict[str, float] | None) -> dict[str, float] | None:
        for prefix, weight in (blend or {}).items():
            if not 0.0 < weight < math.inf:
                raise ValueError(f"data.blend gives {prefix} the weight {weight}: set it above 0, or leave it out")
        return blend

    @field_validator("validation")
    @classmethod
    def _names_are_names(cls, validation: dict[str, str]) -> dict[str, str]:
        for name in validation:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ValueError(f"data.validation names a set {name!r}: use letters, digits, - and _, as in books")
        return validation

    @model_validator(mode="after")
    def _one_text_to_train_on(self) -> "DataConfig":
        if (self.prefix is None) == (self.blend is None):
            given = "neither data.prefix nor data.blend is" if self.prefix is None else "data.prefix and data.blend are"
            raise ValueError(f"{given} set: set data.prefix to a corpus, or data.blend to several with their weights")
        if self.validation and float(self.shares.split(",")[1]):
            raise ValueError(
                f"data.validation names held-out corpora, and data.split {self.shares} holds documents out as well: "
                f"leave data.split out, or set its second share to 0"
            )
        return self
