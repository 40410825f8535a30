"""The losses: what users call, and all between their tensors and a kernel."""
