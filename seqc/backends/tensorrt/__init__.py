"""The TensorRT backend: engines of the ONNX models that :mod:`seqc.backends.onnx` writes, built without a GPU.

:mod:`engines` is its entrance. :mod:`child` runs in a process of its own; nothing here imports TensorRT anywhere else.
"""
