"""A Llama-architecture language model that decodes with jax_ifa. Read model.py, then decoding.py."""
