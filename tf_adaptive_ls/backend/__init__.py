"""Private members of Keras, differences between TensorFlow and JAX, devices, and `fit`."""

import keras

if keras.backend.backend() not in ("tensorflow", "jax"):
    raise ImportError(
        "Expected Keras on TensorFlow or JAX. Received: Keras on the backend "
        f"'{keras.backend.backend()}'. Set KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax "
        "before Keras is imported."
    )
