"""Fused Triton kernels for mixtures of experts, each beside its definition in plain torch (`reference.py`).

`ffn.py` holds the FFN experts, `heads.py` the gates of attention experts, `dispatch.py` the way in from transformers.
Importing this package imports neither torch nor triton.
"""
