"""Secateurs on onnxruntime: export, and the checks of latency, memory and accuracy on the file that ships."""
