"""Finds the optimizers of a model, under whatever names its `compile` gives them."""

import keras

from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer


def adaptive_optimizers(model: keras.Model) -> dict[str, AdaptiveLossScaleOptimizer]:
    """The `AdaptiveLossScaleOptimizer`s of a model by the names of its attributes.

    Those in lists and dicts are numbered, or have the name of their place there, too.
    """
    found: dict[AdaptiveLossScaleOptimizer, str] = {}
    for name, value in vars(model).items():
        if name.startswith("_self_"):  # TensorFlow's own notes of them
            continue
        if isinstance(value, AdaptiveLossScaleOptimizer):
            found.setdefault(value, name)
        elif isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for place, each in items:
                if isinstance(each, AdaptiveLossScaleOptimizer):
                    found.setdefault(each, f"{name}_{place}")
    return {name: optimizer for optimizer, name in found.items()}
