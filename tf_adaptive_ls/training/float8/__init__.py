"""Float8 operands: settings, quantization, and the matmuls of layers."""
