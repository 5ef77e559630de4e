"""A model as a nested system of optimization problems, and what it costs."""
