"""Hyper-parameters of every model family: names, defaults (the original study's) and allowed values.

Apart from the models, so that a study file can be checked without loading torch.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

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

from datawall.models import external

IN_NO_KEY = "models are told apart by their values, which are in the records"  # see `engine.code`

# How schedules are counted: in steps, so that they are the same for every subset, or in passes over it. Passes give the
# original's KL warm-up (scVI) and decay of the rate (SSL), not its early stopping (patience of 45 and 30 passes).
type Schedule = Literal["steps", "epochs"]


class Hyperparameters(BaseModel):
    """Hyper-parameters of a family."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    takes_steps: ClassVar[bool] = True  # whether the number of steps and the initial weights decide what `fit` makes


class Network(Hyperparameters):
    """Hyper-parameters of every family of networks."""

    n_genes: PositiveInt | None = None  # panel: so many of the subset's most variable genes, or all of the corpus
    keep: Literal["best", "last"] = "best"  # which weights, by the loss on a tenth of the subset; theirs were the last


class PretrainedPCA(Hyperparameters):
    """Hyper-parameters of PretrainedPCA."""

    takes_steps: ClassVar[bool] = False

    n_components: PositiveInt = 50  # axes kept; fewer where the pretraining cells or variable genes are fewer


class Geneformer(Network):
    """Hyper-parameters of Geneformer, whose panel is its vocabulary."""

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


class ScVI(Network):
    """Hyper-parameters of scVI."""

    n_hidden: PositiveInt = 128  # width of the one hidden layer of encoder and decoder
    n_latent: PositiveInt = 10
    n_layers: PositiveInt = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1  # in the encoder
    batch_size: Annotated[int, Field(ge=2)] = 1024  # cells a step; batch normalisation needs two
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-6
    kl_warmup: Annotated[float, Field(ge=0, le=1)] = 0.1  # share of the steps in which the KL weight rises to one
    schedule: Schedule = "steps"  # "epochs": the KL weight rises over 400 passes, as theirs did, whatever the subset


class SSL(Network):
    """Hyper-parameters of SSL, the masked autoencoder."""

    n_hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [512, 512, 256, 256]  # of the encoder; mirrored
    n_latent: PositiveInt = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of a cell's genes hidden
    loss: Literal["masked", "vae"] = "masked"
    output: Literal["linear", "sigmoid"] = "linear"  # theirs, sigmoid, cannot reach targets above one
    batch_size: PositiveInt = 16_384  # cells a step
    learning_rate: PositiveFloat = 1e-3
    n_decays: PositiveInt = 54  # times in the budget that the rate is multiplied by 0.9; theirs on the full corpus
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    schedule: Schedule = "steps"  # "epochs": the rate decays every two passes, as theirs did, whatever the subset


class SCimilarity(Network):
    """Hyper-parameters of SCimilarity."""

    n_hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [1024, 1024, 1024]  # of the encoder; mirrored
    n_latent: PositiveInt = 128
    input_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    margin: PositiveFloat = 0.05  # of the triplet loss
    triplet_weight: Annotated[float, Field(ge=0, le=1)] = 0.001  # the reconstruction has the rest
    l1: NonNegativeFloat = 1e-4  # on the weights of one layer, times the learning rate
    l1_layer: Literal["first", "last"] = "first"  # theirs hit the encoder's last by mistake
    ontology: str | None = None  # path of a Cell Ontology file (OBO): kin of a cell's type are then no negatives
    batch_size: Annotated[int, Field(ge=2)] = 1000  # cells a step
    learning_rate: PositiveFloat = 0.005
    weight_decay: NonNegativeFloat = 0.01


class External(Hyperparameters):
    """Hyper-parameters of a model of the user's own (`external`): whatever its class takes."""

    model_config = ConfigDict(extra="allow")


FAMILIES: dict[str, type[Hyperparameters]] = {
    "PretrainedPCA": PretrainedPCA,
    "scVI": ScVI,
    "SSL": SSL,
    "Geneformer": Geneformer,
    "SCimilarity": SCimilarity,
}
# Models of the original's side experiments by name: a family, and what differs from it. How scVI's sizes were made
# is not on record; here hidden and latent width grow together.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "scvi_0.5x": ("scVI", {"n_hidden": 64, "n_latent": 5}),
    "scvi_1x": ("scVI", {"n_hidden": 128, "n_latent": 10}),
    "scvi_2x": ("scVI", {"n_hidden": 256, "n_latent": 20}),
    "scvi_4x": ("scVI", {"n_hidden": 512, "n_latent": 40}),
    "geneformer_32": ("Geneformer", {"n_embd": 32}),
    "geneformer_64": ("Geneformer", {"n_embd": 64}),
    "geneformer_128": ("Geneformer", {"n_embd": 128}),
    "geneformer_256": ("Geneformer", {"n_embd": 256}),
    "geneformer_wd_1e-4": ("Geneformer", {"weight_decay": 1e-4}),
    "geneformer_wd_1e-3": ("Geneformer", {"weight_decay": 1e-3}),
    "geneformer_wd_1e-2": ("Geneformer", {"weight_decay": 1e-2}),
    "ssl_vae": ("SSL", {"loss": "vae"}),
}


def family(model: str) -> str:
    """The family of a model: its own name, `module:Class`, or that of the family it is a variant of.

    Raises
    ------
    ValueError
        If there is no such model.
    """
    if model in FAMILIES or external.is_external(model):
        return model
    if model not in VARIANTS:
        raise ValueError(
            f"{model!r} is no model; there are {', '.join([*FAMILIES, *VARIANTS])}, and your own as module:Class"
        )
    return VARIANTS[model][0]


def takes_steps(model: str) -> bool:
    """Whether a model's budget is counted in optimiser steps."""
    return of_family(family(model)).takes_steps


def of_family(name: str) -> type[Hyperparameters]:
    """The hyper-parameters that a family has."""
    return FAMILIES.get(name, External)


def check(model: str, values: dict[str, Any]) -> Hyperparameters:
    """Hyper-parameters of a model, complete with its variant's values and its family's defaults.

    Raises
    ------
    ValueError
        If the model, a name or a value is not allowed; in one line.
    """
    values = {**VARIANTS[model][1], **values} if model in VARIANTS else values
    try:
        return of_family(family(model))(**values)
    except ValidationError as error:
        mistakes = "; ".join(
            f"{mistake['loc'][0]} {mistake['input']!r}: {mistake['msg']}" if mistake["loc"] else mistake["msg"]
            for mistake in error.errors()
        )
        raise ValueError(f"{model}: {mistakes}") from None
