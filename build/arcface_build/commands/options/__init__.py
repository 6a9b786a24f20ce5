"""What commands share: common options, the configuration behind them, and output."""
