"""Serving a model by the interface of OpenAI: over `transformers serve`, or by vLLM."""
