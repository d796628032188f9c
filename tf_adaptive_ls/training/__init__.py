"""What Keras trains with: layers, plans of models, the optimizer."""
