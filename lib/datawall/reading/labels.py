"""Names as a reader should see them."""

from __future__ import annotations

LABELS = {
    "cell_type": "cell type",
    "celltype_reweighted": "cell-type reweighted",
    "geometric_sketching": "geometric sketch",
    "micro_f1": "micro-F1",
    "macro_f1": "macro-F1",
    "error_rate": "share of cells wrong",
    "probe_micro_f1": "micro-F1 of a linear probe",
    "probe_macro_f1": "macro-F1 of a linear probe",
    "full_micro_f1": "micro-F1, whole network trained",
    "full_macro_f1": "macro-F1, whole network trained",
    "avg_bio": "AvgBIO",
    "total": "scIB total",
    "ilisi": "iLISI",
    "kbet": "kBET acceptance",
    "asw_batch": "batch ASW",
    "bras": "BRAS",
    "pearson_r": "Pearson r of means",
    "pearson_delta": "Pearson r of changes",
    "mse": "mean squared error",
    "pearson_delta_top50": "Pearson r of changes, 50 genes",
    "energy_distance": "energy distance",
    "loss": "loss of held-out cells",
    "explained": "share of chance loss gone",
    "inverse_simpson": "inverse Simpson (types)",
    "shannon": "Shannon (bits)",
    "vendi": "Vendi (cells)",
    "kang2018_held_out": "Kang, held out",
    "pbmc68k": "PBMC 68k",
    "zeroshot_classification": "zero-shot classification",
    "zeroshot_integration": "zero-shot integration",
    "finetuned_classification": "fine-tuned classification",
    "perturbation_response": "perturbation response",
    "kim_lung": "lung",
    "homoharringtonine": "homohar-\nringtonine",
    "ph797804": "PH-797804",
    "tak901": "TAK-901",
    "spikein_10": "10 % perturbed cells",
    "spikein_50": "50 % perturbed cells",
    "LogisticRegression": "logistic regression",
    "NoChange": "no change",
    "MeanShift": "mean shift",
    "TreatedMean": "treated mean",
    "Oracle": "oracle (ceiling)",
    "reconstruction": "reconstruction",
}


def plain(text: str) -> str:
    """A text that matplotlib draws letter by letter: no part of it is a formula, and no legend hides it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def drawn(name: str) -> str:
    """A name as a reader should see it in a figure."""
    return plain(label(name))


def label(name: str) -> str:
    """A name as a reader should see it; of a model named `module:Class`, the class."""
    return LABELS.get(name, name.rpartition(":")[2])
