"""The clients of a Triton server; the exchange is written once without I/O and done by four transports."""
