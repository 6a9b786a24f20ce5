"""The NVIDIA GPUs of this host: what nvidia-smi reports, and the CUDA driver through ctypes."""
