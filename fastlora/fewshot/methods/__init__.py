"""Other recipes on the same data, model and features, for comparison: a linear probe, Tip-Adapter-F, CoOp."""
