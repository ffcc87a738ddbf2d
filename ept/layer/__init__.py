"""The EPT layer: its tensors and formulas."""
