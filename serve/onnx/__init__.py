"""2:4 models as ONNX graphs: `export` makes one, `graph` looks at it, `model` runs it in ONNX Runtime."""
