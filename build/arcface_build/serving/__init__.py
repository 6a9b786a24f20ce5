"""Starting a real tritonserver: find it, choose the backend, run it, watch it, stop it."""
