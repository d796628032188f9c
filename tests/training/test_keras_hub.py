"""Tasks of KerasHub, made small: run once `pip install keras-hub tensorflow-text` is done."""

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tests.graphs import floats, tokens
from tests.steps import (
    assert_equal,
    assert_gradients_within,
    layer_stepper,
    plans_of,
    randomize_scales,
    scaled_layers,
)

keras_hub = pytest.importorskip("keras_hub")
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:.shuffle=True. was passed"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),
    pytest.mark.filterwarnings("ignore:.*compile.* was not called as part of model loading"),
]

VOCABULARY, LENGTH = 32, 12
SMALL = {"vocabulary_size": VOCABULARY, "num_layers": 2, "hidden_dim": 16, "intermediate_dim": 32}
SENTENCES = ["a good film", "the film was bad", "it is good", "it was bad"]
WORDS = sorted({word for sentence in SENTENCES for word in sentence.split()})


def bert_classifier():
    """Takes sentences."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = keras_hub.tokenizers.BertTokenizer(vocabulary=vocabulary)
    preprocessor = keras_hub.models.BertTextClassifierPreprocessor(tokenizer, LENGTH)
    backbone = keras_hub.models.BertBackbone(
        **SMALL, num_heads=2, max_sequence_length=LENGTH, dropout=0.0
    )
    task = keras_hub.models.BertTextClassifier(
        backbone, num_classes=2, preprocessor=preprocessor, dropout=0.0
    )
    return task, (np.array(SENTENCES), np.array([1, 0, 1, 0]))


def gpt2_causal_lm():
    """Takes sentences, and writes them."""
    letters = sorted({*"".join(WORDS), "Ġ", "Ġa", "<|endoftext|>"})
    tokenizer = keras_hub.tokenizers.GPT2Tokenizer(
        vocabulary={letter: i for i, letter in enumerate(letters)}, merges=["Ġ a"]
    )
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, LENGTH)
    backbone = keras_hub.models.GPT2Backbone(
        **SMALL, num_heads=2, max_sequence_length=LENGTH, dropout=0.0
    )
    task = keras_hub.models.GPT2CausalLM(backbone, preprocessor=preprocessor)
    return task, (SENTENCES,)


def llama_causal_lm():
    backbone = keras_hub.models.LlamaBackbone(**SMALL, num_query_heads=4, num_key_value_heads=2)
    return with_tokens(keras_hub.models.LlamaCausalLM(backbone, preprocessor=None))


def gemma_causal_lm():
    """Its output is computed by its embedding, which is shared."""
    backbone = keras_hub.models.GemmaBackbone(
        **SMALL, num_query_heads=4, num_key_value_heads=1, head_dim=8
    )
    return with_tokens(keras_hub.models.GemmaCausalLM(backbone, preprocessor=None))


def with_tokens(task):
    x = {
        "token_ids": tokens(4, LENGTH, high=VOCABULARY),
        "padding_mask": np.arange(LENGTH) < np.array([[LENGTH], [3], [7], [LENGTH]]),
    }
    return task, (x, tokens(4, LENGTH, high=VOCABULARY, seed=2))


def resnet_classifier():
    """Takes images."""
    backbone = keras_hub.models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        image_shape=(16, 16, 3),
    )
    converter = keras_hub.layers.ResNetImageConverter(image_size=(16, 16))
    preprocessor = keras_hub.models.ResNetImageClassifierPreprocessor(converter)
    task = keras_hub.models.ResNetImageClassifier(
        backbone, num_classes=2, preprocessor=preprocessor
    )
    return task, (floats(4, 16, 16, 3), np.array([1, 0, 1, 0]))


TASKS = [bert_classifier, gpt2_causal_lm, llama_causal_lm, gemma_causal_lm, resnet_classifier]
WRITERS = [gpt2_causal_lm, llama_causal_lm, gemma_causal_lm]


@pytest.fixture(params=TASKS, ids=lambda task: task.__name__, name="make")
def _make(request):
    keras.utils.set_random_seed(0)
    return request.param


def inputs_of(task, data):
    """What comes out of the preprocessor."""
    return data[0] if task.preprocessor is None else task.preprocessor(*data)[0]


def written(task, data):
    prompt = {k: v[:2] for k, v in data[0].items()} if isinstance(data[0], dict) else "a "
    return task.generate(prompt, max_length=LENGTH, stop_token_ids=None)


def assert_same(actual, expected):
    keras.tree.map_structure(np.testing.assert_array_equal, actual, expected)


def test_gradients(make, rng):
    task, data = make()
    x = inputs_of(task, data)
    arguments = {"args": (x,), "training": True}
    plain = layer_stepper(task, task, arguments)()
    assert als.wrap_model(task) is task
    run = layer_stepper(task, task, arguments)
    neutral, expected = run(), run()
    assert plans_of(task)
    for name in [name for name in plain.gradients if name.endswith("key/bias")]:
        # Zero but for rounding: a softmax does not see what is added to all scores.
        del plain.gradients[name], neutral.gradients[name]
    assert_gradients_within(neutral, plain, ulps=64)
    assert_same(neutral.outputs, plain.outputs)
    randomize_scales(task, rng)
    assert_equal(run(), expected)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_and_files(make, jit_compile, tmp_path, mixed_float16):
    task, data = make()
    kind = type(task)
    als.wrap_model(task)
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(1e-2))
    task.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=["accuracy"],
        jit_compile=jit_compile,
        **({"sampler": "greedy"} if make in WRITERS else {}),
    )
    history = task.fit(*data, batch_size=4, epochs=30, verbose=0).history["loss"]
    assert isinstance(task, kind)
    assert history[-1] < history[0] / 2
    assert optimizer.skipped_steps == 0
    assert any(row.log2_scale for row in als.scale_table(task))

    x = inputs_of(task, data)
    expected = task(x, training=False)
    text = written(task, data) if make in WRITERS else None

    task.save_to_preset(str(tmp_path / "preset"))
    assert "tf_adaptive_ls" not in (tmp_path / "preset" / "task.json").read_text()
    assert "tf_adaptive_ls" not in (tmp_path / "preset" / "config.json").read_text()
    # KerasHub reads no mixed policy of a preset by itself.
    loaded = kind.from_preset(str(tmp_path / "preset"), dtype="mixed_float16")
    assert not scaled_layers(loaded)
    assert_same(loaded(x, training=False), expected)
    assert scaled_layers(task) and isinstance(task, kind)

    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert isinstance(loaded, kind)
    scales = [row.log2_scale for row in als.scale_table(task)]
    assert [row.log2_scale for row in als.scale_table(loaded)] == scales
    assert_same(loaded(x, training=False), expected)

    als.strip_model(task)
    assert type(task) is kind
    assert_same(task(x, training=False), expected)
    if text is not None:
        assert_same(written(task, data), text)
