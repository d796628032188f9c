"""Trains on handwritten digits in float16, and deploys the model with 4-bit weights.

Trains the small residual network of `digits.py`, makes its float32 twin, quantizes it with 128
calibration images, exports it for LiteRT, and runs the file on test images. Prints the accuracy and
the size of each model.
"""

import common
import digits
import keras
import numpy as np

import tf_adaptive_ls as als


def accuracy(scores, labels):
    return f"{np.mean(np.argmax(scores, axis=-1) == labels):.2%}"


def run_litert(path, images):
    """The outputs of LiteRT's interpreter for images. `None` if it is not installed."""
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        return None
    interpreter = Interpreter(model_path=str(path))
    taken = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(taken, images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken, images)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def main(argv=None):
    args = common.parser(__doc__, 15, 64, "digits_4_bits.keras").parse_args(argv)
    common.begin(args)
    x_train, x_test, y_train, y_test = digits.load_data()
    x_train, y_train = common.whole_batches(args, x_train, y_train)

    model = als.wrap_model(digits.build_model())
    model.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    print("Compiling; the first step takes a while.")
    model.fit(x_train, y_train, args.batch_size, epochs=args.epochs)
    trained = model.predict(x_test, len(x_test), verbose=0)

    twin = als.plain_copy(model, dtype="float32")
    small, report = als.quantize_weights(twin, x_train[:128], bits=4, budget=0.1)
    print(f"\n{report}\n")
    print(f"Test accuracy, trained in float16: {accuracy(trained, y_test)}")
    for name, each in {"float32 twin": twin, "4 bits": small}.items():
        scores = each.predict(x_test, len(x_test), verbose=0)
        print(f"Test accuracy, {name}: {accuracy(scores, y_test)}")

    args.output.parent.mkdir(parents=True, exist_ok=True)
    small.save(args.output)
    print(f"\nSaved the model, plain Keras, to {args.output}")
    if keras.backend.backend() == "tensorflow":
        exported = args.output.with_suffix(".tflite")
        small.export(exported, format="litert", verbose=False)
        print(f"Exported it to {exported}")
        scores = run_litert(exported, x_test)
        if scores is not None:
            print(f"Test accuracy in LiteRT: {accuracy(scores, y_test)}")


if __name__ == "__main__":
    main()
