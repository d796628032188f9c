"""Finds the optimizers of a model, whatever attributes its `compile` stores them in."""

import keras

from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer


def adaptive_optimizers(model: keras.Model) -> dict[str, AdaptiveLossScaleOptimizer]:
    """The `AdaptiveLossScaleOptimizer`s of a model by the name of the attribute.

    For those in lists and dicts, the index or key is added to the name.
    """
    found: dict[AdaptiveLossScaleOptimizer, str] = {}
    for name, value in vars(model).items():
        if name.startswith("_self_"):  # attributes that TensorFlow adds
            continue
        if isinstance(value, AdaptiveLossScaleOptimizer):
            found.setdefault(value, name)
        elif isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for place, each in items:
                if isinstance(each, AdaptiveLossScaleOptimizer):
                    found.setdefault(each, f"{name}_{place}")
    return {name: optimizer for optimizer, name in found.items()}
