"""How a model gets it: its parts, one forward, the paths of its states, its task."""
