"""The damage estimators by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitsearch import registry

if TYPE_CHECKING:
    from bitsearch.objectives.damage.scoring import Estimator

GROUP = "bitsearch.estimators"
_DAMAGE = "bitsearch.objectives.damage"

ESTIMATORS = {
    "kl": f"{_DAMAGE}.kl:kl",
    "jsd_from_widest": f"{_DAMAGE}.jsd_from_widest:jsd_from_widest",
    "fisher_output": f"{_DAMAGE}.fisher_output:fisher_output",
    "fisher_output_data": f"{_DAMAGE}.fisher_output:fisher_output_data",
    "fisher_weight": f"{_DAMAGE}.fisher_weight:fisher_weight",
    "fisher_weight_from_widest": f"{_DAMAGE}.fisher_weight:fisher_weight_from_widest",
    "noise_slope": f"{_DAMAGE}.noise_slope:noise_slope",
    "hessian_trace": f"{_DAMAGE}.hessian_trace:hessian_trace",
    "hessian_eigenvalue": f"{_DAMAGE}.hessian_eigenvalue:hessian_eigenvalue",
    "hessian_eigenvalue_ranking": f"{_DAMAGE}.hessian_eigenvalue:hessian_eigenvalue_ranking",
    "hessian_input_activation": f"{_DAMAGE}.backup_noise:hessian_input_activation",
    "weight_quantization_error": f"{_DAMAGE}.backup_noise:weight_quantization_error",
    "gradient_alignment": f"{_DAMAGE}.gradient_alignment:gradient_alignment",
    "first_order": f"{_DAMAGE}.first_order:first_order",
    "first_order_signed": f"{_DAMAGE}.first_order:first_order_signed",
    "output_error": f"{_DAMAGE}.output_error:output_error",
    "relative_output_error": f"{_DAMAGE}.output_error:relative_output_error",
    "outlier_features": f"{_DAMAGE}.outlier_features:outlier_features",
    "weight_error": f"{_DAMAGE}.weight_error:weight_error",
}


def load_estimator(name: str) -> Estimator:
    """The estimator of a name.

    Raises:
        UsageError: no such estimator.
    """
    estimator: Estimator = registry.load(GROUP, ESTIMATORS, name)
    return estimator
