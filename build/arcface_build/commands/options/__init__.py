"""What commands share: their options, the configuration behind these, and how a result is handed over."""
