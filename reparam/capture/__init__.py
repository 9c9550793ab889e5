"""A file or a module becomes a captured graph: safe loading, tracing."""
