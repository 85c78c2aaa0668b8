"""Sessions of TensorRT, and the device's memory."""
