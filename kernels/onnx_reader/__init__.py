"""ONNX files as torch modules: `load_onnx`.

load_onnx.py    the public function
reading/        model_file.py: a file from a stranger, checked, its size bounded; node.py: its
                attributes, none overlooked; graph_reader.py, values.py: the torch.fx graph and all
                shapes; constants.py: what depends on shapes and numbers alone; patterns.py: SiLU,
                Hardswish and biases that files spell out
operators/      what each operator is in torch
"""
