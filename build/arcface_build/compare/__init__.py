"""Any two sources of embeddings side by side: drift, accuracy, faults in words, and layer by layer."""
