"""Sessions of TensorRT, and the memory of the device."""
