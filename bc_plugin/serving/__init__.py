"""vLLM with vectors in place: registered with it by its own means, where toolkits are patched.

Everything here runs in vLLM's processes. ``register`` is the entry point; nothing else is imported
before a compensated checkpoint is met.
"""
