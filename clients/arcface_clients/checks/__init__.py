"""Looking at what is there: parity of a server, speed of an engine, the state of this host."""
