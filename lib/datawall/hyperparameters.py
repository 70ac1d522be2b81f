"""Hyper-parameters of every model family: names, defaults (the original study's) and allowed values.

Apart from the models, so that a study file can be checked without loading torch.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)


class Hyperparameters(BaseModel):
    """Hyper-parameters of a family."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PretrainedPCA(Hyperparameters):
    """Hyper-parameters of PretrainedPCA."""

    n_components: PositiveInt = 50  # axes kept; fewer where the pretraining cells or variable genes are fewer


class Geneformer(Hyperparameters):
    """Hyper-parameters of Geneformer."""

    n_genes: PositiveInt | None = None  # vocabulary: this many of the subset's most variable genes, or all
    max_length: PositiveInt = 2048  # tokens of a cell, its highest ranked genes
    n_layers: Annotated[int, Field(ge=2)] = 6  # the embedding is the second-to-last
    n_heads: PositiveInt = 4
    n_embd: PositiveInt = 256  # the feed-forward layer is twice as wide
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.02
    init_std: PositiveFloat = 0.02
    batch_size: PositiveInt = 144  # cells a step
    learning_rate: PositiveFloat = 1e-3  # at its peak
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.027  # share of the steps; theirs was 10,000 of about 370,000
    weight_decay: NonNegativeFloat = 1e-3

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Geneformer:
        if self.n_embd % self.n_heads:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_heads {self.n_heads}")
        return self


FAMILIES: dict[str, type[Hyperparameters]] = {"PretrainedPCA": PretrainedPCA, "Geneformer": Geneformer}


def check(family: str, values: dict[str, Any]) -> Hyperparameters:
    """Hyper-parameters of a family, complete with defaults.

    Raises
    ------
    ValueError
        If the family, a name or a value is not allowed; in one line.
    """
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is no model; the families are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[family](**values)
    except ValidationError as error:
        mistakes = "; ".join(
            f"{mistake['loc'][0]} {mistake['input']!r}: {mistake['msg']}" if mistake["loc"] else mistake["msg"]
            for mistake in error.errors()
        )
        raise ValueError(f"{family}: {mistakes}") from None
