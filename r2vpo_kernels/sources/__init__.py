"""Where logits come from: each source with its autograd Functions, on top of the registered ops."""
