"""Every figure, a function each: takes a table, returns a matplotlib figure whose title says what the table shows.

Colour-blind safe, units on axes. Curves are a file, all else another; `style` has what they share.
"""

from datawall.engine import lazy

_NAMES = {
    "curves": (
        *("beside_published", "budgets", "diversity", "known_answer", "learning_curves", "loss_and_score"),
        *("loss_curves", "over_lever", "per_class_curves", "scaling", "spike_ins", "variants"),
    ),
    "maps": (
        *("cells_saved", "composition", "effects", "embedding_seconds", "embeddings", "markers", "realism", "rules"),
        *("saturation_map", "suspects", "untrained", "verdict_map"),
    ),
    "style": ("STRATEGIES", "plt", "save"),
}
__getattr__, __dir__ = lazy.attach(
    __name__, {name: f"{__name__}.{file}:{name}" for file, names in _NAMES.items() for name in names}
)
