"""The evaluation tasks: each takes arrays and labels, knows no model, and returns metrics by name."""

from datawall.tasks.classification import zeroshot_classification
from datawall.tasks.finetuning import finetuned_classification
from datawall.tasks.integration import zeroshot_integration
from datawall.tasks.perturbation import perturbation_response

__all__ = ["finetuned_classification", "perturbation_response", "zeroshot_classification", "zeroshot_integration"]

HEADLINE = {
    "zeroshot_classification": "micro_f1",
    "zeroshot_integration": "avg_bio",
    "finetuned_classification": "micro_f1",
    "perturbation_response": "pearson_r",
}  # the metric by which the original study judges each task
