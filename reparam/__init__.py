"""reparam: turn a trained PyTorch model into its inference form, and prove by measurement that nothing changed."""
