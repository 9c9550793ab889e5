"""Formulas of the lift table: what a call of an operation is as affine maps of its operands."""
