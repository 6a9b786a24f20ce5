"""The NVIDIA GPUs of this host: what nvidia-smi tells, and the CUDA driver through ctypes."""
