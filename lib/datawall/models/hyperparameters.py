"""Models by name: families and their hyper-parameters, with defaults (the original study's) and allowed values.

Apart from the models, so that a study file can be checked without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from datawall.models import external

IN_NO_KEY = "models are told apart by their values, which are in the records"  # see `engine.code`

# How schedules are counted: in steps, so that they are the same for every subset, or in passes over it. Passes give the
# original's KL warm-up (scVI) and decay of the rate (SSL), not its early stopping (patience of 45 and 30 passes).
type Schedule = Literal["steps", "epochs"]


class Hyperparameters(BaseModel):
    """Hyper-parameters of a family."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    place: ClassVar[str]  # of the family's class: the module in `models`, and its name there
    takes_steps: ClassVar[bool] = True  # whether the number of steps and the initial weights decide what `fit` makes


class Network(Hyperparameters):
    """Hyper-parameters of every family of networks."""

    n_genes: PositiveInt | None = None  # panel: so many of the subset's most variable genes, or all of the corpus
    keep: Literal["best", "last"] = "best"  # which weights, by the loss on a tenth of the subset; theirs were the last


class PretrainedPCA(Hyperparameters):
    """Hyper-parameters of PretrainedPCA."""

    place: ClassVar[str] = "pca:PretrainedPCA"
    takes_steps: ClassVar[bool] = False

    n_components: PositiveInt = 50  # axes kept; fewer where the pretraining cells or variable genes are fewer


class Geneformer(Network):
    """Hyper-parameters of Geneformer, whose panel is its vocabulary."""

    place: ClassVar[str] = "geneformer:Geneformer"

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

    def model_post_init(self, context: Any) -> None:
        if self.n_embd % self.n_heads:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_heads {self.n_heads}")


class ScVI(Network):
    """Hyper-parameters of scVI."""

    place: ClassVar[str] = "scvi:ScVI"

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

    place: ClassVar[str] = "ssl:SSL"

    n_hidden: Annotated[list[PositiveInt], Field(min_length=1)] = [512, 512, 256, 256]  # of the encoder; mirrored
    n_latent: PositiveInt = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of a cell's genes hidden
    loss: Literal["masked", "vae", "contrastive"] = "masked"
    output: Literal["linear", "sigmoid"] = "linear"  # theirs, sigmoid, cannot reach targets above one
    batch_size: PositiveInt = 16_384  # cells a step
    learning_rate: PositiveFloat = 1e-3
    n_decays: PositiveInt = 54  # times in the budget that the rate is multiplied by 0.9; theirs on the full corpus
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    schedule: Schedule = "steps"  # "epochs": the rate decays every two passes, as theirs did, whatever the subset


class SCimilarity(Network):
    """Hyper-parameters of SCimilarity."""

    place: ClassVar[str] = "scimilarity:SCimilarity"

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
    **{f"scvi_{x}x": ("scVI", {"n_hidden": int(128 * x), "n_latent": int(10 * x)}) for x in (0.5, 1, 2, 4)},
    **{f"geneformer_{n}": ("Geneformer", {"n_embd": n}) for n in (32, 64, 128, 256)},
    **{f"geneformer_wd_{x}": ("Geneformer", {"weight_decay": float(x)}) for x in ("1e-4", "1e-3", "1e-2")},
    "ssl_vae": ("SSL", {"loss": "vae"}),
    "ssl_contrastive": ("SSL", {"loss": "contrastive"}),
}


@dataclass(frozen=True)
class ModelSpec:
    """What the name of a model stands for; `resolve` makes it."""

    name: str  # as in a study file: a family, a variant or a labelled one (`SSL@wide`), or the user's `module:Class`
    family: str  # of `scvi_2x` scVI; one of the user's own is its own family
    hyperparameters: Hyperparameters  # complete with the variant's values and the family's defaults

    @property
    def is_external(self) -> bool:
        """Whether it is the user's own."""
        return ":" in self.name

    @property
    def takes_steps(self) -> bool:
        """Whether its budget is counted in optimiser steps."""
        return self.hyperparameters.takes_steps

    @property
    def place(self) -> str:
        """Its class, as `module:Class`."""
        return self.name if self.is_external else f"datawall.models.{self.hyperparameters.place}"

    @property
    def module(self) -> str:
        """The module of its class: `datawall.models.scvi`, or the user's own."""
        return self.place.partition(":")[0]

    @property
    def model_class(self) -> type[Any]:
        """Its class (see `base.Model`); raises ValueError if a module of the user's has none that is a model."""
        return external.model_class(self.name) if self.is_external else resolve_name(self.place)

    def create(self) -> Any:
        return self.model_class(**self.hyperparameters.model_dump())


def without_label(name: str) -> str:
    """A model's name without its label: of `SSL@wide`, SSL; one of the user's own, `module:Class`, has none."""
    return name if ":" in name else name.partition("@")[0]


def is_model(name: str) -> bool:
    """Whether there is such a model: a family or a variant, with or without a label, or one of the user's own."""
    return ":" in name or without_label(name) in {*FAMILIES, *VARIANTS}


def resolve(
    name: str, given: Mapping[str, Mapping[str, Any]] | None = None, *, schedule: Schedule | None = None
) -> ModelSpec:
    """What a model's name stands for; ValueError if there is no such model or hyper-parameter, or not such a value.

    `given` has hyper-parameters by family and by model, as a study file has them: those of the family yield to those of
    a variant, and these to those of the model. A label sets a model apart whose hyper-parameters are given under its
    whole name: `SSL@wide` has all that SSL has, and more of its own. `schedule` is for a family that has one and is
    given none.
    """
    base = without_label(name)
    if not is_model(name):
        raise ValueError(
            f"{name!r} is no model; there are {', '.join([*FAMILIES, *VARIANTS])}, and your own as module:Class"
        )
    given, (family, values) = given or {}, VARIANTS.get(base, (base, {}))
    kind = FAMILIES.get(family, External)
    scheduled = {"schedule": schedule} if schedule and "schedule" in kind.model_fields else {}
    values = {**scheduled, **given.get(family, {}), **values, **given.get(base, {}), **given.get(name, {})}
    try:
        return ModelSpec(name, family, kind(**values))
    except ValidationError as error:
        mistakes = "; ".join(
            f"{mistake['loc'][0]} {mistake['input']!r}: {mistake['msg']}" if mistake["loc"] else mistake["msg"]
            for mistake in error.errors()
        )
        raise ValueError(f"{name}: {mistakes}") from None


def check(model: str, values: dict[str, Any]) -> Hyperparameters:
    """Hyper-parameters of a model, complete; raises as `resolve` does."""
    return resolve(model, {model: values}).hyperparameters
