"""Models from anywhere: our own zoo, torchvision, timm, segmentation_models_pytorch, Python
functions, exported programs and ONNX files, each a source of `sources.py`, a file each.

A model's name is its whole description: `timm:resnet50d`, `smp:Unet?encoder_name=resnet34`,
`./net.py:build?width=2`, `model.pt2`. With a seed and a weights file any process can build it.
"""
