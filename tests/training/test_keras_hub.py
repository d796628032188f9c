"""Models of KerasHub, made small: run once `pip install keras-hub` is done."""

import keras
import numpy as np
import pytest
from graphs import tokens
from steps import assert_equal, assert_gradients_within, layer_stepper, randomize_scales

import tf_adaptive_ls as als

keras_hub = pytest.importorskip("keras_hub")
pytestmark = pytest.mark.long

VOCABULARY, LENGTH = 32, 12
SMALL = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}


def bert_classifier():
    backbone = keras_hub.models.BertBackbone(
        **SMALL, num_heads=2, max_sequence_length=LENGTH, dropout=0.0
    )
    return keras_hub.models.BertTextClassifier(backbone, num_classes=4, preprocessor=None)


def llama_causal_lm():
    backbone = keras_hub.models.LlamaBackbone(**SMALL, num_query_heads=4, num_key_value_heads=2)
    return keras_hub.models.LlamaCausalLM(backbone, preprocessor=None)


def gemma_causal_lm():
    """Its output is computed by its embedding, which is shared."""
    backbone = keras_hub.models.GemmaBackbone(
        **SMALL, num_query_heads=4, num_key_value_heads=1, head_dim=8
    )
    return keras_hub.models.GemmaCausalLM(backbone, preprocessor=None)


TASKS = [bert_classifier, llama_causal_lm, gemma_causal_lm]


def built(task):
    """The graph of a task, inputs and targets."""
    task = task()
    model = keras.Model(task.input, task.output)
    inputs = {
        "token_ids": tokens(4, LENGTH, high=VOCABULARY),
        "segment_ids": tokens(4, LENGTH, high=2, seed=1),
        "padding_mask": np.arange(LENGTH) < np.array([[LENGTH], [3], [7], [LENGTH]]),
    }
    inputs = {name: inputs[name] for name in task.input}
    shape = model(inputs).shape[:-1]
    return model, inputs, tokens(*shape, high=4, seed=2)


@pytest.mark.parametrize("task", TASKS)
def test_gradients(task, rng):
    model, inputs, _ = built(task)
    plain = layer_stepper(model, model, {"args": (inputs,)})()
    wrapped = als.wrap_model(model)
    assert any("backbone/" in row.name for row in als.scale_table(wrapped))
    run = layer_stepper(wrapped, model, {"args": (inputs,)})
    neutral = run()
    assert_gradients_within(neutral, plain, ulps=64)
    for y, expected in zip(neutral.outputs, plain.outputs, strict=True):
        np.testing.assert_array_equal(y, expected)
    randomize_scales(wrapped, rng)
    assert_equal(run(), neutral)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_training_and_saving(task, jit_compile, tmp_path, mixed_float16):
    model, x, y = built(task)
    wrapped = als.wrap_model(model)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(1e-2))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapped.compile(optimizer, loss=loss, jit_compile=jit_compile)
    history = wrapped.fit(x, y, batch_size=4, epochs=30, verbose=0).history["loss"]
    assert history[-1] < history[0] / 2
    assert optimizer.skipped_steps == 0
    assert any(row.log2_scale for row in als.scale_table(wrapped))

    expected = wrapped(x, training=False)
    if task is bert_classifier:
        wrapped.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    else:
        # No plain Functional model of their layers is loaded either: Keras does not
        # recognise the shared embedding, a layer of a Llama does not tell its config.
        wrapped.save_weights(tmp_path / "model.weights.h5")
        loaded = als.wrap_model(built(task)[0])
        loaded.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(loaded(x, training=False), expected)
    scales = [row.log2_scale for row in als.scale_table(wrapped)]
    assert [row.log2_scale for row in als.scale_table(loaded)] == scales
    plain = als.strip_model(wrapped)
    plain.export(tmp_path / "exported", verbose=False)
    np.testing.assert_array_equal(plain(x, training=False), expected)
